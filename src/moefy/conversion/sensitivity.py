"""What an error in each FFN's output costs the whole model: the Fisher information of its outputs.

For an FFN with output y the expected rise of the loss by an error e is ½ eᵀGe, to second order, with
G = E[ggᵀ] and g = ∂(-log p(label)) / ∂y, where labels are drawn from the model's own prediction. So no labels
are needed, and every model with logits has it: language models, classifiers, encoder-decoders.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from moefy.calibrate import output_mask, row_mask, without_cache
from moefy.conversion.one_pass import SMALLEST_SPILLED, in_one_piece, not_spilled, spill_folder
from moefy.errors import MoefyError, MoefyWarning
from moefy.kernels.native import return_freed_memory
from moefy.sites import ExpertSite, Site

_SPANS = ("start_logits", "end_logits")  # (N, L): a label is a place in the text
_LOGITS = ("logits", *_SPANS)


@dataclass(frozen=True)
class Metrics(Mapping[str, Tensor]):
    """G (D, D) float32 by site: `matrices` by name times a number of the site's own, both in `scales`.

    The experts of a mixture's layer share one: of a layer of 128 experts and D 2,048 they would be 2 GB, and of the few
    tokens that an expert gets hardly one has full rank. What differs is how much they are weighted.
    """

    matrices: Mapping[str, Tensor]
    scales: Mapping[str, tuple[str, float]]
    of_loss: bool = True  # not where a model without logits was measured by random projections

    def __getitem__(self, name: str) -> Tensor:
        matrix, scale = self.scales[name]
        return self.matrices[matrix] if scale == 1 else self.matrices[matrix] * scale

    def __iter__(self) -> Iterator[str]:
        return iter(self.scales)

    def __len__(self) -> int:
        return len(self.scales)


def output_metrics(
    model: nn.Module,
    sites: Mapping[str, Site],
    batches: Iterable[Mapping[str, Any]],
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    hold_bytes: int = 1 << 30,
) -> Metrics:
    """G by site, the mean over the batches' real tokens: a forward and a backward pass each.

    Memory: `hold_bytes` of what the backward pass needs of one batch; the rest goes to a temporary directory. A model
    without logits is measured by random projections of its output, which makes layers comparable but is no loss.
    Raises MoefyError if real tokens get NaN or infinite logits, or if the temporary directory is full.
    """
    if any(p.is_inference() for p in model.parameters()):
        raise MoefyError("This model was made in torch.inference_mode(), where nothing has gradients; load it outside.")
    sums, of_loss = _Sums(model, sites), True
    generator = torch.Generator().manual_seed(seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    downs = {name: site.owner.get_submodule(site.family.down) for name, site in sites.items()}
    handles = [down.register_forward_hook(sums.probe(name)) for name, down in downs.items()]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for done, batch in enumerate(batches, 1):
            sums.batch = batch
            with torch.enable_grad(), spilled(hold_bytes, model.parameters()):
                with _quick_products(model), in_one_piece(model):  # of a chunk nobody knows which tokens are padding
                    out = model(**without_cache(model, batch))
                of_loss = of_loss and any(name in out for name in _LOGITS)
                _loss(model, out, batch, generator).backward()
            return_freed_memory()  # glibc keeps it in pieces: 0.5 GB after a batch of 512 tokens through 200 layers
            if progress:
                progress(done)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
    return sums.means(of_loss)


class _Sums:
    """Sums of ggᵀ over the real tokens of each layer of FFNs, and of |g|² and tokens of each FFN."""

    def __init__(self, model: nn.Module, sites: Mapping[str, Site]):
        self.model, self.sites = model, sites
        self.batch: Mapping[str, Any] = {}  # that runs
        self.groups = {name: site.layer_name if isinstance(site, ExpertSite) else name for name, site in sites.items()}
        self.products: dict[str, Tensor] = {}
        self.squares, self.counts = dict.fromkeys(sites, 0.0), dict.fromkeys(sites, 0)

    def probe(self, name: str) -> Callable[..., Tensor]:
        """A forward hook of one FFN's down-projection, which sees gradients though the weights are frozen."""
        group, factor = self.groups[name], self.sites[name].multipliers[1]

        def add(gradient: Tensor) -> None:
            rows = gradient.reshape(-1, gradient.shape[-1]).float() / factor  # of the output, not of what makes it
            product = rows.t() @ rows
            self.products[group] = self.products.get(group, 0) + product
            self.squares[name] += product.trace().item()

        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            if not torch.is_grad_enabled():  # within a function of its own, as Reformer's
                raise MoefyError(
                    f"What an error of {name} costs this model cannot be measured, since it computes its layers "
                    f"outside of autograd; use a recipe whose allocation is uniform, such as engine."
                )
            rows = out.numel() // out.shape[-1]
            keep = row_mask(self.model, name, self.batch, rows)
            self.counts[name] += rows if keep is None else int(keep.sum())
            asking = out + out.new_zeros(()).requires_grad_()
            asking.register_hook(add)
            return asking

        return hook

    def means(self, of_loss: bool) -> Metrics:
        """The means over the tokens of each group's sites, scaled by each site's own mean square."""
        total, square = dict.fromkeys(self.products, 0), dict.fromkeys(self.products, 0.0)
        for name, group in self.groups.items():
            if group in self.products:
                total[group] += self.counts[name]
                square[group] += self.squares[name]
        matrices = {group: matrix / max(1, total[group]) for group, matrix in self.products.items()}
        scales: dict[str, tuple[str, float]] = {}
        for name, group in self.groups.items():
            count = self.counts[name]
            if group == name and group in self.products:
                scales[name] = group, 1.0
            elif group in self.products and count:  # without a token it cannot be measured
                scales[name] = group, self.squares[name] / count / (square[group] / total[group] or 1.0)
        return Metrics(matrices, scales, of_loss)


@contextmanager
def _quick_products(model: Any) -> Iterator[None]:
    """For a forward pass: products, and so those of its backward pass, in bfloat16, where the model is in float16 and
    the machine multiplies that one fast.

    torch's float16 products of a backward pass take up to 100 times as long (256 x 1,536 by 1,536 x 576 on a Zen 4:
    131 ms, 1.2 in bfloat16, 2.6 in float32). Where there are instructions for neither, that is said.
    """
    fast = [dtype for dtype, known in _KNOWN.items() if getattr(torch.ops.mkldnn, known, lambda: False)()]
    if torch.float16 in fast or not any(p.dtype == torch.float16 for p in model.parameters()):
        yield
        return
    if not fast:
        warnings.warn(
            "float16 is computed slowly on this machine, up to 50 times slower than float32; a conversion is faster of "
            "a model that is loaded in float32 (--dtype float32).",
            MoefyWarning,
            stacklevel=2,
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=bool(fast)):
        yield


# What says whether oneDNN has instructions for a type.
_KNOWN = {torch.float16: "_is_mkldnn_fp16_supported", torch.bfloat16: "_is_mkldnn_bf16_supported"}


@dataclass(frozen=True)
class _Spilled:
    """A tensor in a file, which comes back with its strides: products of other ones may round differently."""

    file: Path
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def write(cls, tensor: Tensor, file: Path) -> _Spilled:
        plain = tensor.resolve_conj().resolve_neg()
        plain = plain.contiguous() if _is_scattered(plain) else plain
        once = plain[tuple(slice(1 if stride == 0 else None) for stride in plain.stride())]  # of an expanded one
        save_file({"bytes": once.contiguous().flatten().view(torch.uint8)}, file)
        return cls(file, plain.dtype, plain.shape, plain.stride())

    def read(self) -> Tensor:
        # A copy: products round differently on memory that does not start on a cache line, as mapped files do not.
        once = [1 if stride == 0 else size for size, stride in zip(self.shape, self.strides, strict=True)]
        plain = load_file(self.file)["bytes"].clone().view(self.dtype).view(once)
        return torch.empty_strided(once, self.strides, dtype=self.dtype).copy_(plain).expand(self.shape)


def _is_scattered(tensor: Tensor) -> bool:
    """Whether it reaches over far more memory than it fills, as a column of a large matrix does."""
    places = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return sum((size - 1) * stride for size, stride in places) >= 2 * math.prod(size for size, _ in places)


@contextmanager
def spilled(hold_bytes: int, but: Iterable[Tensor]) -> Iterator[None]:
    """Hold so many bytes of what autograd saves in a with block, and what shares memory with `but`; write the rest."""
    kept = {tensor.untyped_storage().data_ptr() for tensor in but}
    numbers = itertools.count()
    held = 0

    def pack(tensor: Tensor) -> Tensor | _Spilled:
        nonlocal held
        tensor = tensor.detach()  # an output that holds itself would never be freed
        if tensor.layout is not torch.strided or not tensor.is_cpu:
            return tensor
        size = tensor.nbytes
        if size < SMALLEST_SPILLED or tensor.untyped_storage().data_ptr() in kept:
            return tensor
        if held + size <= hold_bytes:
            held += size  # what the backward pass gives back is not counted: it is the last to come
            return tensor
        try:
            return _Spilled.write(tensor, folder / f"{next(numbers)}.safetensors")
        except (OSError, SafetensorError) as error:
            raise not_spilled(folder.parent, error) from None

    def unpack(saved: Tensor | _Spilled) -> Tensor:
        return saved if isinstance(saved, Tensor) else saved.read()

    with spill_folder() as folder, torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _loss(model: Any, out: Any, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """-log p of labels drawn from the model's own distribution, summed over real tokens or examples."""
    found, mask = [name for name in _LOGITS if name in out], output_mask(model, batch)
    if not found:
        return _normal(_real(out[0].float(), mask), generator)
    loss = torch.zeros((), device=out[found[0]].device)
    for name in found:
        logits = out[name].float()
        if name in _SPANS and isinstance(mask, Tensor) and mask.shape == logits.shape:
            logits = logits.masked_fill(~mask.bool(), -torch.inf)[mask.any(1)]
        logits = _real(logits, mask)
        if logits.isnan().any() or logits.amax(-1).isinf().any():  # -inf is a model's way to rule a label out
            raise MoefyError(
                "The model gives NaN or infinite logits on the calibration; check the calibration data, and load the "
                "model in bfloat16 or float32 if it is in float16, which may overflow."
            )
        loss = loss + _head(getattr(model.config, "problem_type", None), logits.shape[-1])(logits, generator)
    return loss


def _real(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Rows (R, C) of an output (..., C) that are no padding, which may hold anything."""
    if isinstance(mask, Tensor) and mask.shape == rows.shape[:-1]:
        return rows[mask.bool()]
    return rows.reshape(-1, rows.shape[-1])


def _head(problem: str | None, labels: int) -> Callable[[Tensor, torch.Generator], Tensor]:
    """The distribution that a model's logits are of, by its config's `problem_type`."""
    if problem == "regression" or (problem is None and labels == 1):  # as transformers takes it
        return _normal
    return _bernoulli if problem == "multi_label_classification" or labels == 1 else _categorical


def _categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    logs = logits.log_softmax(-1)
    labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
    return -logs.gather(1, labels).sum()


def _bernoulli(logits: Tensor, generator: torch.Generator) -> Tensor:
    labels = torch.bernoulli(logits.detach().sigmoid(), generator=generator)
    return binary_cross_entropy_with_logits(logits, labels, reduction="sum")


def _normal(values: Tensor, generator: torch.Generator) -> Tensor:
    """Of variance 1 around each value: gradients of random signs have the same second moments as those of draws."""
    signs = torch.randint(0, 2, values.shape, generator=generator).to(values) * 2 - 1
    return (values * signs).sum()
