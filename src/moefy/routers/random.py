"""Random selection (MoEfication's baseline): scores are pseudo-random, a function of the token's input.

Derived from the input's bits rather than drawn from a generator, so that a saved model gives the same
output in every process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.routers.base import Router
from moefy.stats import NeuronStats
from moefy.types import LayerSpec, MoEWeights, Partition

_MASK = 0x7FFFFFFF


class RandomRouter(Router):
    """Scores (T, E) that a seed and the bits of x (T, D) determine (MoEfication's baseline)."""

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.register_buffer("seed", torch.zeros((), dtype=torch.int64))

    @classmethod
    def build(cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, seed: int) -> RandomRouter:
        router = cls(spec)
        router.seed.fill_(seed)  # type: ignore[operator]
        return router

    def forward(self, x: Tensor, weights: MoEWeights | None) -> Tensor:
        token = x.float().contiguous().view(torch.int32).long().sum(dim=1, keepdim=True)
        expert = torch.arange(self.spec.experts, device=x.device)
        state = (token + self.seed * 40503 + (expert + 1) * 2654435761) & _MASK  # type: ignore[operator]
        for _ in range(3):  # rounds of a 31-bit mix; two left visible stripes between neighbouring experts
            state = ((state ^ (state >> 15)) * 1103515245 + 12345) & _MASK
        return (state ^ (state >> 16)).float()
