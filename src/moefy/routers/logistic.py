"""A linear router fitted to decide: is an expert worth running for this token?

Cost-sensitive logistic regression: the label is whether what losing the expert costs (`stats.unrepaired`:
after the shared neurons have repaired what they can) is above the layer's threshold, and the weight of an
example is how far from it, which is the squared error that a wrong decision leaves. It starts from the ridge
regression to the cost's root. The form is that of `LinearRouter`, so what runs one runs the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.routers.base import Router
from moefy.routers.linear import LinearRouter, ridge
from moefy.stats import NeuronStats, thinned, unrepaired
from moefy.types import LayerSpec, Partition

EPOCHS, BATCH, RATE, DECAY = 10, 1024, 2e-3, 1e-4
# Bytes of inputs and costs to train on; more tokens are thinned evenly. SmolLM2: 190,000 tokens.
HOLD_BYTES = 1 << 29
# Costs that the threshold is read from.
SAMPLE = 1 << 17
# An example counts at most as if its cost were this many times the threshold.
CLIP = 20.0


class LogisticRouter(LinearRouter):
    """Scores (T, E) = x (T, D) weight (E, D)ᵀ + bias (E,), fitted to decide; moefy's own (docs/log.md)."""

    @classmethod
    def build(cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, seed: int) -> LogisticRouter:
        return cls._fit(spec, _examples(spec, partition, stats), seed)

    @classmethod
    def build_without(
        cls, spec: LayerSpec, partition: Partition, stats: NeuronStats, parts: Sequence[int], seed: int
    ) -> dict[int, Router]:
        seen = _examples(spec, partition, stats)
        return {part: cls._fit(spec, seen.without(part), seed) for part in parts}

    @classmethod
    def _fit(cls, spec: LayerSpec, seen: _Examples, seed: int) -> LogisticRouter:
        x, cost = seen.inputs, seen.cost
        generator = torch.Generator().manual_seed(seed)
        sample = cost.flatten()[torch.randint(cost.numel(), (SAMPLE,), generator=generator)]
        rate = sample.quantile(1 - spec.top_k / spec.experts).clamp_min(1e-30)
        start, offset = ridge(x, cost.sqrt(), seen.weight)
        mean, spread = x.mean(0), x.std(0) + 1e-6
        # Of unit inputs, centred on the threshold, with scores of a scale that the logistic loss can use.
        scale = 2 / ((x[:4096] @ start).std() + 1e-9)
        w, b = start * spread[:, None] * scale, (offset + mean @ start - rate.sqrt()) * scale
        w, b = _train(w, b, (x - mean) / spread, cost / rate, seen.weight, generator)
        router = cls(spec)
        router.weight.copy_((w / spread[:, None]).t())
        router.bias.copy_(b - mean @ (w / spread[:, None]))
        return router


@dataclass(frozen=True)
class _Examples:
    """Inputs (T, D), what losing each expert costs (T, E), and the weights (T,) and parts (T,) of the tokens."""

    inputs: Tensor
    cost: Tensor
    weight: Tensor
    part: Tensor

    def without(self, part: int) -> _Examples:
        """Those that `NeuronStats.split_inputs(part)` does not hold out; all, if there is no such part."""
        keep = self.part != part
        if keep.all():
            return self
        return _Examples(self.inputs[keep], self.cost[keep], self.weight[keep], self.part[keep])


def _examples(spec: LayerSpec, partition: Partition, stats: NeuronStats) -> _Examples:
    """What losing each expert alone costs on the calibration tokens, thinned to HOLD_BYTES."""
    cost = unrepaired(stats, partition)
    step = -(-stats.tokens * 4 * (spec.width + spec.experts) // HOLD_BYTES)
    inputs, costs, weights, parts, start = [], [], [], [], 0
    for x, h, y in stats.activations():
        some = thinned(start, step)
        inputs.append(x[some])
        costs.append(cost(h[some]))
        weights.append(stats.token_weight(y[some]))
        parts.append(stats.parts(start, len(x))[some])
        start += len(x)
    return _Examples(torch.cat(inputs), torch.cat(costs), torch.cat(weights), torch.cat(parts))


def _train(
    w: Tensor, b: Tensor, x: Tensor, cost: Tensor, weight: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The weights (D, E) and biases (E,) after Adam at a falling rate."""
    w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
    optimizer = torch.optim.Adam([w, b], lr=RATE, betas=(0.9, 0.98))
    batch = min(BATCH, len(x))
    steps = EPOCHS * (len(x) // batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    for _ in range(EPOCHS):
        order = torch.randperm(len(x), generator=generator)
        for rows in order[: len(x) // batch * batch].view(-1, batch):
            c = cost[rows]
            importance = (c - 1).abs().clamp_max(CLIP) * weight[rows, None]
            with torch.enable_grad():
                scores = x[rows] @ w + b
                loss = F.binary_cross_entropy_with_logits(scores, (c > 1).float(), importance)
                loss = loss + DECAY * w.square().sum() / w.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return w.detach(), b.detach()
