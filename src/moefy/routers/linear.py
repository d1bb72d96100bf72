"""A linear router: ridge regression from the input to the log of each expert's contribution.

The one kind of router that stock engines can run. The log makes the fit about ratios, which is what
ranking is about; a contribution is the squared norm of an expert's output.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.kernels.native import PackedRouter
from moefy.routers.base import Router
from moefy.stats import NeuronStats, contributions
from moefy.types import LayerSpec, MoEWeights, Partition

# Relative to the median variance of the inputs, which a few massive channels do not move as they do the mean; 1e-3 to
# 1e-1 (of the mean) give the same recall on SmolLM2 within 0.2 points.
RIDGE = 1e-2
# Experts of ReLU neurons contribute exactly 0 to many tokens: the log starts at this share of the mean.
FLOOR = 1e-3


class LinearRouter(Router):
    """Scores (T, E) = x (T, D) weight (E, D)ᵀ + bias (E,), by ridge regression; moefy's own (docs/log.md)."""

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.weight = self._weight(spec.experts, spec.width)
        self.bias = self._weight(spec.experts)

    @classmethod
    def build(cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, seed: int) -> LinearRouter:
        routed = stats.ffn.take(partition.experts.flatten())
        total, tokens = 0.0, 0
        for x in stats.inputs():
            total, tokens = total + contributions(routed, spec.experts, x).sum().item(), tokens + len(x)
        floor = FLOOR * total / (tokens * spec.experts) or 1e-30

        xx = torch.zeros(spec.width + 1, spec.width + 1, dtype=torch.float64)
        xy = torch.zeros(spec.width + 1, spec.experts, dtype=torch.float64)
        for x in stats.inputs():
            target = (contributions(routed, spec.experts, x) + floor).log().double()
            features = F.pad(x.double(), (0, 1), value=1.0)
            xx += features.t() @ features
            xy += features.t() @ target
        weight, bias = _solve(xx, xy)
        router = cls(spec)
        router.weight.copy_(weight.t())
        router.bias.copy_(bias)
        return router

    def forward(self, x: Tensor, weights: MoEWeights | None) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())

    def packed(self) -> PackedRouter:
        return PackedRouter.linear(self.weight, self.bias)


def ridge(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The ridge regression from x (T, D) to y (T, E), tokens weighted (T,): weights (D, E) and biases (E,), float32."""
    xx = torch.zeros(x.shape[1] + 1, x.shape[1] + 1, dtype=torch.float64)
    xy = torch.zeros(x.shape[1] + 1, y.shape[1], dtype=torch.float64)
    for rows, targets, w in zip(x.split(4096), y.split(4096), weight.split(4096), strict=True):
        features = F.pad(rows, (0, 1), value=1.0)
        weighted = (features * w[:, None]).t()
        xx += weighted @ features
        xy += weighted @ targets
    w, b = _solve(xx, xy)
    return w.float(), b.float()


def _solve(xx: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression from the second moments of inputs with a constant 1 as their last column."""
    tokens = xx[-1, -1]
    # Centring takes the intercept out of the penalty.
    mean_x, mean_y = xx[-1, :-1] / tokens, xy[-1] / tokens
    cov = xx[:-1, :-1] - tokens * mean_x[:, None] * mean_x
    cross = xy[:-1] - tokens * mean_x[:, None] * mean_y
    variances = cov.diagonal()
    moving = variances[variances > 1e-12 * variances.mean()]  # not those of channels that are constant
    variances.add_(RIDGE * moving.median() + 1e-12 if len(moving) else 1e-12)
    solution = torch.linalg.solve(cov, cross)
    return solution, mean_y - mean_x @ solution
