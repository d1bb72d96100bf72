"""What an error in each FFN's output costs the whole model: the Fisher information of its outputs.

For an FFN with output y the expected rise of the loss by an error e is ½ eᵀGe, to second order, with
G = E[ggᵀ] and g = ∂(-log p(label)) / ∂y, where labels are drawn from the model's own prediction. So no labels
are needed, and every model with logits has it: language models, classifiers, encoder-decoders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moefy.calibrate import row_mask, without_cache
from moefy.sites import Site
from moefy.types import MoefyError

_LOGITS = ("logits", "start_logits", "end_logits")


def output_metrics(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Iterable[Mapping[str, Any]],
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """G (D, D) float32 by site, the mean over the batches' real tokens: a forward and a backward pass each.

    Memory: the activations of one batch. A model without logits is measured by random projections of its
    output, which makes layers comparable but is no loss. Raises MoefyError if real tokens get NaN or infinite logits.
    """
    metrics: dict[str, Tensor] = {}
    counts = dict.fromkeys(sites, 0)
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]

    def probe(name: str) -> Callable[..., Tensor]:
        def add(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1]).float()
            metrics[name] = metrics.get(name, 0) + rows.t() @ rows

        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            rows = out.numel() // out.shape[-1]
            keep = row_mask(model, name, batch, rows)
            counts[name] += rows if keep is None else int(keep.sum())
            zero = torch.zeros_like(out, requires_grad=True)
            zero.register_hook(add)
            return out + zero

        return hook

    downs = {name: site.owner.get_submodule(site.family.down) for name, site in sites.items()}
    handles = [down.register_forward_hook(probe(name)) for name, down in downs.items()]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for done, batch in enumerate(batches, 1):
            with torch.enable_grad():
                _loss(model(**without_cache(model, batch)), batch, generator).backward()
            if progress:
                progress(done)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return {name: metric / max(1, counts[name]) for name, metric in metrics.items()}


def _loss(out: Any, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """-log p of labels drawn from the model's own distribution, summed over real tokens or examples."""
    found = [out[name] for name in _LOGITS if name in out]
    if not found:
        rows = out[0].float()
        signs = torch.randint(0, 2, rows.shape, generator=generator).to(rows) * 2 - 1
        return (rows * signs).sum()
    loss = found[0].new_zeros((), dtype=torch.float32)
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    for logits in found:
        logs = logits.float().log_softmax(-1)
        if isinstance(mask, Tensor) and mask.shape == logs.shape[:-1]:
            logs = logs[mask.bool()]
        if logs.isnan().any():  # -inf is a model's way to rule a label out, and padding may hold anything
            raise MoefyError(
                "The model gives NaN or infinite logits on the calibration; check the calibration data, and load the "
                "model in bfloat16 or float32 if it is in float16, which may overflow."
            )
        logs = logs.reshape(-1, logs.shape[-1])
        labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        loss = loss - logs.gather(1, labels).sum()
    return loss
