"""The oracle: scores are the experts' true contributions (MoEfication's ground-truth selection).

It computes every expert to decide which to skip: the upper bound that routers are measured against.
"""

from __future__ import annotations

from torch import Tensor

from moefy.routers.base import Router
from moefy.stats import NeuronStats, contributions
from moefy.types import LayerSpec, MoEWeights, Partition


class OracleRouter(Router):
    ships = False

    @classmethod
    def build(cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, seed: int) -> OracleRouter:
        return cls(spec)

    def forward(self, x: Tensor, weights: MoEWeights | None) -> Tensor:
        assert weights is not None
        return contributions(weights.routed.to(x.dtype), weights.experts, x).float()
