"""What tiny random models have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import nn

WIDTH, NEURONS, VOCAB = 32, 48, 97

Feed = Callable[[int, torch.Generator], dict[str, torch.Tensor]]


class More(NamedTuple):
    """What makes a model, its inputs (a kind of them or a function of the batch's size), and how many FFNs it has."""

    make: Callable[[], nn.Module]
    feed: str | Feed = "text"
    sites: int = 2


def decoder(config: type, model: type, **changes: Any) -> nn.Module:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return model(config(**{**common, **changes}))


def bert_like(config: type, model: type, **changes: Any) -> nn.Module:
    return model(
        config(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=NEURONS,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            **changes,
        )
    )


def shaped(ids: dict[str, tuple[int, ...]] | None = None, **floats: tuple[int, ...]) -> Feed:
    """Random inputs by their shapes without the batch."""

    def make(batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        feed = {name: torch.randn(batch, *shape, generator=generator) for name, shape in floats.items()}
        for name, shape in (ids or {}).items():
            feed[name] = torch.randint(3, VOCAB, (batch, *shape), generator=generator)
        return feed

    return make


def with_more(feed: Feed, more: Callable[[int], dict[str, torch.Tensor]]) -> Feed:
    return lambda batch, generator: {**feed(batch, generator), **more(batch)}


def by_class(model: str, feed: str | Feed = "text", sites: int = 2, **config: Any) -> More:
    """A model by the name of its class."""

    def make() -> Any:
        cls = getattr(tf, model)
        # By its name: in transformers 5.20 one class names another's. And 5.18 takes some of what it is given away.
        kind = getattr(tf, f"{model.removesuffix('Model')}Config", cls.config_class)
        return cls(kind(**copy.deepcopy(config)))

    return More(make, feed, sites)


LAYERS = {"hidden_size": WIDTH, "intermediate_size": NEURONS, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**LAYERS, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0}
TOWER = {**TEXT, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {**LAYERS, "image_size": 16, "patch_size": 4}
BOTH_HALVES = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": NEURONS,
    "decoder_ffn_dim": NEURONS,
}
