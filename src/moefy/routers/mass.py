"""MoEfication's ground truth: scores are the experts' positive activation mass (arXiv 2110.01786, section 3.2).

Like the oracle it computes every neuron to decide which to skip, so it saves nothing: the selection that the
paper measures the others against. The oracle ranks by what an expert adds to the output instead.
"""

from __future__ import annotations

from torch import Tensor

from moefy.routers.base import Router
from moefy.stats import NeuronStats, activation_mass
from moefy.types import LayerSpec, MoEWeights, Partition


class MassRouter(Router):
    ships = False

    @classmethod
    def build(cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, seed: int) -> MassRouter:
        return cls(spec)

    def forward(self, x: Tensor, weights: MoEWeights | None) -> Tensor:
        assert weights is not None
        return activation_mass(weights.routed.to(x.dtype), weights.experts, x)
