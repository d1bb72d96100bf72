"""Similarity selection (MoEfication, section 3.2): cosine of the input and the experts' mean input weights."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from moefy.kernels.native import PackedRouter
from moefy.routers.base import Router
from moefy.stats import NeuronStats
from moefy.types import LayerSpec, MoEWeights, Partition


class SimilarityRouter(Router):
    """Scores (T, E): cosines of x (T, D) and centroids (E, D) (MoEfication, section 3.2)."""

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.centroids = self._weight(spec.experts, spec.width)

    @classmethod
    def build(cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, seed: int) -> SimilarityRouter:
        ffn = stats.ffn
        rows = F.normalize(ffn.up if ffn.gate is None else ffn.gate, dim=1)
        router = cls(spec)
        router.centroids.copy_(F.normalize(rows[partition.experts].mean(dim=1), dim=1))
        return router

    def forward(self, x: Tensor, weights: MoEWeights | None) -> Tensor:
        # The input's norm is the same for all experts and does not change their order.
        return F.linear(x.float(), self.centroids.float())

    def packed(self) -> PackedRouter:
        return PackedRouter.linear(self.centroids)
