"""The study of what a model's neurons and experts do: MoEfication's sections on sparsity and on routing.

`study` returns plain data, which goes to JSON as it is; `moefy.report` draws it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moefy.moe import moe_layers
from moefy.sources.models import check_weights
from moefy.study import measures
from moefy.study.collect import Layer, collect
from moefy.study.preferences import over_sequences, preferences, turned

Progress = Callable[[int, int], None]
# A token is listed if it occurs so often, and only the commonest are.
TOKEN_OCCURS, TOKENS_LISTED = 10, 150
# SmolLM2-135M as CMoE, 8 batches of 256 tokens: 166 s to look at them, and 70 s for the figures.
FIGURES = 0.4
PARTS = ["first quarter", "second quarter", "third quarter", "last quarter"]
FREQUENCIES = ["rare (the rarest quarter)", "uncommon", "common", "very common"]


def study(
    model: Any,
    tokenizer: Any,
    batches: Sequence[Mapping[str, Any]],
    labels: Sequence[Tensor] | None = None,
    label_names: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Everything about every FFN of a model, dense or converted, on model inputs, as plain data.

    `labels` gives the label (N,) of each batch's sequences; `progress(done, total)` counts layers looked at in a
    batch. Raises MoefyError if there is nothing to look at or a weight is not finite.
    """
    converted = moe_layers(model)
    for moe in converted.values():
        moe.unpack()  # it is studied unpacked, and packed weights cannot be checked
    check_weights(model)
    steps = _Steps(len(batches), bool(converted), progress)
    layers, streams = collect(model, batches, labels, steps.looked)
    tokens = {name: stream.joined() for name, stream in streams.items()}
    found: dict[str, Any] = {}
    for layer in layers.values():
        steps.figured(len(found), len(layers))
        found[layer.name] = _layer(layer, tokens[layer.stream], tokenizer, label_names, seed)
    steps.figured(len(found), len(layers))
    # Experts of a mixture do not see the same tokens.
    routed = [layer for layer in layers.values() if layer.chosen and not layer.places]
    pairs = [{"first": a.name, "second": b.name, **_pair(a, b)} for a, b in pairwise(routed) if a.stream == b.stream]
    return {
        "model": type(model).__name__,
        "converted": bool(converted),
        "tokens": {name: len(t["ids"]) for name, t in tokens.items()},
        "sequences": {name: stream.count for name, stream in streams.items()},
        "layers": found,
        "between_layers": pairs,
    }


class _Steps:
    """Progress in layers looked at in a batch. The figures of a converted model's layer take as long as FIGURES of its
    batches, those of a dense one no time to speak of."""

    def __init__(self, batches: int, converted: bool, progress: Progress | None) -> None:
        self.batches, self.progress, self.seen = batches, progress, 0
        self.each = round(FIGURES * batches) if converted else 0

    def looked(self, batch: int, layers: int) -> None:
        self.seen = min(self.seen + 1, (batch + 1) * layers)  # a layer may be used more than once
        if self.progress:
            self.progress(self.seen, (self.batches + self.each) * layers)

    def figured(self, done: int, layers: int) -> None:
        if self.progress:
            self.progress(self.batches * layers + done * self.each, (self.batches + self.each) * layers)


def _layer(
    layer: Layer, tokens: dict[str, Tensor], tokenizer: Any, label_names: Sequence[str], seed: int
) -> dict[str, Any]:
    count = max(1, layer.tokens)
    result: dict[str, Any] = {
        "stream": layer.stream,
        "neurons": layer.neurons,
        "sparsity": measures.sparsity(torch.cat(layer.active)),
        "activation_rates": measures.rates(layer.fired / count),
        "marker_rates": measures.rates(layer.marked / count),
    }
    if not layer.chosen:
        return result
    chosen = torch.cat(layer.chosen)
    places = torch.cat(layer.places) if layer.places else None
    if places is not None:
        tokens = {name: rows[places] for name, rows in tokens.items()}
    result.update(
        experts=layer.experts,
        top_k=layer.top_k,
        load=measures.load(chosen, layer.experts),
        between_inputs=measures.between_inputs(chosen, tokens["sequences"], layer.experts, seed, places),
        preferences=_preferences(chosen, layer.experts, tokens, tokenizer, label_names, seed),
    )
    return result


def _pair(a: Layer, b: Layer) -> dict[str, Any]:
    return measures.between_layers(torch.cat(a.chosen), torch.cat(b.chosen), (a.experts, b.experts))


def _preferences(
    chosen: Tensor,
    experts: int,
    tokens: dict[str, Tensor],
    tokenizer: Any,
    label_names: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    ids, sequences = tokens["ids"], tokens["sequences"]
    parts = (tokens["positions"] * 4).long().clamp(0, 3)
    found = {
        "part": preferences(chosen, parts, PARTS, turned(sequences), experts, seed),
        "frequency": preferences(chosen, _frequency(ids), FREQUENCIES, None, experts, seed),
    }
    if "labels" in tokens:
        labels = tokens["labels"]
        names = list(label_names) or [str(i) for i in range(int(labels.max()) + 1)]
        found["label"] = preferences(chosen, labels, names, over_sequences(sequences), experts, seed)
    listed = _listed(ids)
    if len(listed):
        place = {int(t): i for i, t in enumerate(listed)}
        classes = torch.tensor([place.get(int(t), -1) for t in ids])
        names = [_text(tokenizer, int(t)) for t in listed]
        found["token"] = preferences(chosen, classes, names, None, experts, seed)
    return found


def _frequency(ids: Tensor) -> Tensor:
    """The quarter (T,) of each token by how often its id occurs here: every class has about a quarter of them."""
    counts = torch.bincount(ids)[ids]
    order = counts.argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(ids)))
    # All occurrences of an id share a class: that of their middle rank.
    middle = torch.zeros(int(ids.max()) + 1).index_add_(0, ids, rank.float())[ids] / counts
    return (middle * 4 / len(ids)).long().clamp(0, 3)


def _listed(ids: Tensor) -> Tensor:
    counts = torch.bincount(ids)
    order = counts.argsort(descending=True, stable=True)[:TOKENS_LISTED]
    return order[counts[order] >= TOKEN_OCCURS]


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token)) if tokenizer is not None else str(token)
