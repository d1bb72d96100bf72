"""What the converted FFNs of a model run: counts of tokens and experts, and the share of the multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from moefy.moe import moe_layers
from moefy.types import Usage


@contextmanager
def usage(model: nn.Module) -> Iterator[dict[str, Usage]]:
    """Count what every converted layer of a model runs for the length of a with block, padding included."""
    layers = moe_layers(model)
    before = {name: moe._usage for name, moe in layers.items()}
    counted = {name: Usage(torch.zeros(moe.spec.experts, dtype=torch.long)) for name, moe in layers.items()}
    for name, moe in layers.items():
        moe._usage = counted[name]
    try:
        yield counted
    finally:
        for name, moe in layers.items():
            if (outer := before[name]) is not None:
                outer.counts += counted[name].counts
                outer.tokens += counted[name].tokens
            moe._usage = outer


def realised_fraction(model: nn.Module, counted: dict[str, Usage]) -> float:
    """Multiply-adds of the FFNs that ran over the dense ones, routers included, from what `usage` counted."""
    layers = moe_layers(model)
    sizes = {n: m.spec.multiply_adds * counted[n].tokens for n, m in layers.items()}
    done = sum(m.active_fraction(counted[n].experts_per_token) * sizes[n] for n, m in layers.items())
    return done / max(1, sum(sizes.values()))
