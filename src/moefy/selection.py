"""Selection by threshold: every expert whose score is above one number a layer, beside top-k.

Tokens differ in how many experts they need, and top-k gives all the same: at equal mean cost one threshold
a layer left 28 % (layer 8 of SmolLM2) and 14 % (layer 22) less error than top-k (docs/log.md). What a token
can cost is bounded by `most`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.routers.base import Router
from moefy.stats import NeuronStats
from moefy.types import MoEWeights

# Scores that a threshold is set on; more tokens are thinned evenly.
HOLD_BYTES = 1 << 27


def above(scores: Tensor, threshold: Tensor | float, most: int) -> Tensor:
    """The experts (T, most) int64 of scores (T, E) above the threshold, -1 in the places left empty.

    Of more than `most`, those with the highest scores; NaN is above nothing.
    """
    values, experts = scores.nan_to_num(nan=-torch.inf).topk(min(most, scores.shape[1]), dim=1)
    return experts.where(values > threshold, -1)


@torch.no_grad()
def set_threshold(router: Router, stats: NeuronStats, weights: MoEWeights) -> float:
    """Set and return the router's threshold: the spec's `top_k` experts a token on average.

    It is set on the held-out tokens: on those that a router was fitted to, its scores spread wider.
    Raises ValueError if the spec's `most` is below that average: no threshold can reach it.
    """
    mean, most = router.spec.top_k, router.spec.most
    if mean > most:
        raise ValueError(f"at most {most} experts a token cannot be {mean} on average")
    scores = _held_out_scores(router, stats, weights)
    low, high = float(scores.min()) - 1.0, float(scores.max())
    for _ in range(60):  # bisection: exact to the last bits of float32 from any range of scores
        middle = (low + high) / 2
        found = (scores > middle).sum(1).clamp_max(most).double().mean().item()
        low, high = (middle, high) if found > mean else (low, middle)
    assert router.threshold is not None
    router.threshold.fill_(high)
    return high


def _held_out_scores(router: Router, stats: NeuronStats, weights: MoEWeights) -> Tensor:
    step = -(-stats.tokens * 4 * router.spec.experts // HOLD_BYTES)
    return torch.cat([router(x[held][::step], weights).float() for x, held in stats.split_inputs() if held.any()])
