"""Which neurons are shared, that is, always run: those with the highest scores (F,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefy.construct.elimination import eliminate
from moefy.stats import NeuronStats


def rate(stats: NeuronStats) -> Tensor:
    """CMoE (section 4.1): how often a neuron is among a token's most activated."""
    return stats.rates


def reconstruction(stats: NeuronStats) -> Tensor:
    """How long a neuron stays when the cheapest to lose go first and the others are refitted (`eliminate`)."""
    order = eliminate(stats).order
    return torch.empty(len(order)).index_copy_(0, order, torch.arange(len(order), dtype=torch.float32))


SHARING: dict[str, Callable[[NeuronStats], Tensor]] = {
    "rate": rate,
    "reconstruction": reconstruction,
}
