"""MoEfication's trained selection: a two-layer network predicts each expert's activation mass (section 3.2).

As published: Linear(D, E) that starts at the experts' mean weight rows, tanh, Linear(E, E) that starts at the
identity, no biases, inputs at unit length; binary cross-entropy to the mass over the batch's highest, Adam at
1e-2, batches of 512, 30 epochs at most, a tenth of the tokens held out. The published code keeps the second
best epoch; here the best is kept, the start included, and training stops when it no longer improves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.routers.base import Router
from moefy.stats import NeuronStats, activation_mass, as_mask, captured, thinned
from moefy.types import LayerSpec, MoEWeights, Partition

EPOCHS, BATCH, RATE = 30, 512, 1e-2
# Epochs without a better one before training stops.
PATIENCE = 4
# Memory for the tokens that are trained on; beyond it they are thinned evenly. D 384, E 48: 155,000 tokens.
HOLD_BYTES = 1 << 28


class MLPRouter(Router):
    """Scores (T, E) = tanh(x (T, D) first (E, D)ᵀ) second (E, E)ᵀ of x at unit length (MoEfication, section 3.2)."""

    def __init__(self, spec: LayerSpec):
        super().__init__(spec)
        self.first = self._weight(spec.experts, spec.width)
        self.second = self._weight(spec.experts, spec.experts)

    @classmethod
    def build(cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, seed: int) -> MLPRouter:
        ffn, router = stats.ffn, cls(spec)
        rows = F.normalize(ffn.up if ffn.gate is None else ffn.gate, dim=1)
        x, mass = _examples(spec, partition, stats)
        first, second = _train(rows[partition.experts].mean(dim=1), x, mass, spec.top_k, seed)
        router.first.copy_(first)
        router.second.copy_(second)
        return router

    def forward(self, x: Tensor, weights: MoEWeights | None) -> Tensor:
        return _scores(F.normalize(x.float(), dim=1), self.first.float(), self.second.float())


def _scores(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return F.linear(F.linear(x, first).tanh(), second)


def _examples(spec: LayerSpec, partition: Partition, stats: NeuronStats) -> tuple[Tensor, Tensor]:
    """Inputs (T, D) at unit length and masses (T, E) of the calibration tokens, thinned to HOLD_BYTES."""
    routed = stats.ffn.take(partition.experts.flatten())
    step = -(-stats.tokens * 4 * (spec.width + spec.experts) // HOLD_BYTES)
    inputs, masses, start = [], [], 0
    for x in stats.inputs():
        kept = x[thinned(start, step)]
        start += len(x)
        inputs.append(F.normalize(kept, dim=1))
        masses.append(activation_mass(routed, spec.experts, kept))
    return torch.cat(inputs), torch.cat(masses)


def _train(first: Tensor, x: Tensor, mass: Tensor, top_k: int, seed: int) -> tuple[Tensor, Tensor]:
    """The two matrices at the epoch that captures most mass of the held-out last tenth."""
    held = max(1, len(x) // 10)
    train, generator = len(x) - held, torch.Generator().manual_seed(seed)
    weights = [first.requires_grad_(), torch.eye(len(first)).requires_grad_()]
    optimizer = torch.optim.Adam(weights, lr=RATE)

    def quality() -> float:
        with torch.no_grad():
            chosen = _scores(x[train:], *weights).topk(min(top_k, len(first)), dim=1).indices
            shares = captured(mass[train:], as_mask(chosen, mass.shape[1]))
        return float(shares.mean()) if len(shares) else 0.0

    best, kept, stale = quality(), [w.detach().clone() for w in weights], 0
    for _ in range(EPOCHS):
        for rows in torch.randperm(train, generator=generator).split(BATCH):
            target = mass[rows] / mass[rows].max().clamp_min(1e-30)
            with torch.enable_grad():
                loss = F.binary_cross_entropy_with_logits(_scores(x[rows], *weights), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        now = quality()
        if now > best:
            best, kept, stale = now, [w.detach().clone() for w in weights], 0
        else:
            stale += 1
        if stale == PATIENCE:
            break
    return kept[0], kept[1]
