"""What the study looks at: for every FFN and real token, which neurons fire and which experts are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moefy import kernels
from moefy.calibrate import output_mask, real_tokens, row_mask, rows_of, token_mask
from moefy.errors import MoefyError
from moefy.moe import MoEFFN, moe_layers
from moefy.sites import find_sites, join_experts, token_rows
from moefy.sources.models import check_finite
from moefy.stats import firing, normalised_rows
from moefy.types import FFNWeights

# CMoE's K_a: the neurons that a token marks.
MARKED = 10


@dataclass
class Stream:
    """The tokens that one side of a model sees: the only one, or an encoder's or decoder's."""

    ids: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    sequences: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    count: int = 0

    def joined(self) -> dict[str, Tensor]:
        """ids, relative positions (0 to 1), sequence numbers and, where given, labels; each (T,)."""
        parts = {"ids": self.ids, "positions": self.positions, "sequences": self.sequences, "labels": self.labels}
        return {name: torch.cat(rows) for name, rows in parts.items() if rows}


@dataclass
class Layer:
    """Counts of one FFN. `active` is the share of neurons that each token fires; `chosen` (T, K) its experts.

    `places` (T,) are the places of its tokens in their stream where it does not see each of them once: for an expert
    of a mixture, and for an FFN that layers share. Else it is empty.
    """

    name: str
    stream: str
    neurons: int
    experts: int = 0
    top_k: int = 0
    fired: Tensor = field(default_factory=lambda: torch.empty(0))
    marked: Tensor = field(default_factory=lambda: torch.empty(0))
    active: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    def count(self, ffn: FFNWeights, rows: Tensor, moe: MoEFFN | None) -> None:
        """Add what inputs (T, D) do in the FFN, which experts they take in `moe` included."""
        normalised = normalised_rows(ffn)
        for x in rows.split(1024):
            fires = firing(ffn, x.float()) > 0
            self.fired += fires.sum(0)
            self.active.append(fires.float().mean(1))
            marks = normalised.hidden_of_unit(x.float()).abs().topk(min(MARKED, ffn.neurons), dim=1).indices
            self.marked += torch.bincount(marks.flatten(), minlength=ffn.neurons)
            if moe is not None:
                self.chosen.append(moe.route(x).to(torch.int32))
        self.tokens += len(rows)


def collect(
    model: Any,
    batches: Iterable[Mapping[str, Any]],
    labels: Sequence[Tensor] | None = None,
    step: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Layer], dict[str, Stream]]:
    """Run the model over the batches and note every FFN, dense or converted, and its tokens.

    `labels` gives, for each batch, the label (N,) of each of its sequences. `step(batch, layers)` is called each
    time that one of so many layers has been looked at in a batch.
    """
    layers, watched = _layers(model)
    streams: dict[str, Stream] = {}
    batch: Mapping[str, Any] = {}
    number = 0

    def watch(name: str, read: Callable[[], FFNWeights], moe: MoEFFN | None) -> Callable[..., None]:
        layer = layers[name]

        def hook(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
            rows = rows_of(args, kwargs)
            keep = row_mask(model, name, batch, len(rows))
            rows = rows if keep is None else rows[keep]
            layer.places.append(_places(model, name, batch, streams[layer.stream], len(rows)))
            check_finite(model, rows.abs())
            layer.count(read().to(torch.float32), rows, moe)  # in float32 for one layer at a time
            if step:
                step(number, len(layers))

        return hook

    handles = [
        module.register_forward_pre_hook(watch(name, read, moe), with_kwargs=True)
        for name, (module, read, moe) in watched.items()
    ]
    try:
        with torch.no_grad(), kernels.using("torch"):
            for number, batch in enumerate(batches):
                _note(streams, _sides(model, batch), None if labels is None else labels[number])
                _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        join_experts(model)
    if not streams or not any(layer.tokens for layer in layers.values()):
        raise MoefyError("There is nothing to study; give some text.")
    for layer in layers.values():
        if layer.tokens == sum(map(len, streams[layer.stream].ids)):
            layer.places.clear()
    # No token came by some of a mixture's experts.
    return {name: layer for name, layer in layers.items() if layer.tokens}, streams


def _places(model: Any, name: str, batch: Mapping[str, Any], stream: Stream, given: int) -> Tensor:
    """The places in the stream of the `given` real tokens that an FFN sees at this moment: an expert not all."""
    found, before = token_rows(model, name), sum(map(len, stream.ids[:-1]))
    if found is None:
        return torch.arange(before, before + given)
    rows, count = found
    keep = token_mask(real_tokens(model, name, batch), count)
    keep = torch.ones(count, dtype=torch.bool) if keep is None else keep
    return (keep.cumsum(0) - 1 + before)[rows[keep[rows]]]


def _run(model: Any, batch: Mapping[str, Any]) -> None:
    """Run a batch; MoefyError if what comes out for its real tokens is not finite."""
    out, mask = model(**batch), output_mask(model, batch)
    highest = (out["logits"] if "logits" in out else out[0]).amax(-1)
    if mask is not None and mask.shape == highest.shape:
        highest = highest[mask.bool()]
    check_finite(model, highest[..., None])


_Watched = dict[str, tuple[nn.Module, Callable[[], FFNWeights], MoEFFN | None]]


def _layers(model: Any) -> tuple[dict[str, Layer], _Watched]:
    """The FFNs by name in the model's order: what to count, and the module, weights and MoE to count it at."""
    watched: _Watched = {
        name: (moe, moe.to_dense, moe if moe.routes else None) for name, moe in moe_layers(model).items()
    }
    if not watched:
        watched = {site.entry_name: (site.entry, site.read, None) for site in find_sites(model)}
    two_sided = getattr(model.config, "is_encoder_decoder", False)
    layers = {}
    for name, (_, read, moe) in watched.items():
        side = "decoder" if ".decoder." in f".{name}" else "encoder"
        neurons = moe.spec.neurons if moe is not None else read().neurons
        layer = Layer(name, side if two_sided else "tokens", neurons)
        layer.fired, layer.marked = torch.zeros(neurons), torch.zeros(neurons)
        if moe is not None:
            layer.experts, layer.top_k = moe.spec.experts, moe.top_k
        layers[name] = layer
    return layers, watched


def _sides(model: Any, batch: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """The ids (N, L) that each side of a model sees, and their mask; MoefyError if they are not to be had."""
    if "input_ids" not in batch:
        raise MoefyError(f"The study looks at tokens, and what this {type(model).__name__} is given has no input_ids.")
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"tokens": (batch["input_ids"], batch.get("attention_mask"))}
    ids = batch.get("decoder_input_ids")
    made, labels = getattr(model, "prepare_decoder_input_ids_from_labels", None), batch.get("labels")
    if ids is None and made and labels is not None and labels.ndim == 2:
        ids = made(labels=labels)
    if ids is None:
        raise MoefyError(f"A {type(model).__name__} is studied on batches with decoder_input_ids, or labels.")
    return {"encoder": (batch["input_ids"], batch.get("attention_mask")), "decoder": (ids, output_mask(model, batch))}


def _note(streams: dict[str, Stream], sides: Mapping[str, tuple[Tensor, Tensor | None]], labels: Tensor | None) -> None:
    for side, (ids, mask) in sides.items():
        keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        ids, keep = ids.reshape(-1, ids.shape[-1]), keep.reshape(-1, ids.shape[-1])  # a question's answers apart
        stream = streams.setdefault(side, Stream())
        lengths = keep.sum(1, keepdim=True).clamp_min(1)
        stream.ids.append(ids[keep])
        stream.positions.append(((keep.cumsum(1) - 1) / lengths)[keep])
        numbers = torch.arange(len(ids))[:, None].expand_as(ids)
        stream.sequences.append(numbers[keep] + stream.count)
        if labels is not None:
            stream.labels.append(labels[numbers[keep]])
        stream.count += len(ids)
