"""Selection by threshold: every expert whose score is above one number a layer, beside top-k.

Tokens differ in how many experts they need, and top-k gives all the same: at equal mean cost one threshold
a layer left 28 % (layer 8 of SmolLM2) and 14 % (layer 22) less error than top-k (docs/log.md). What a token
can cost is bounded by `most`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moefy.routers.base import Router
from moefy.stats import HELD_OUT, NeuronStats, thinned
from moefy.types import MoEWeights

# Scores that a threshold is set on; more tokens are thinned evenly.
HOLD_BYTES = 1 << 27
# Held-out tokens that a threshold is set on, if the calibration has them: of 50 % of SmolLM2, calibrated on 12 windows,
# 53 % ran on WikiText-2's test text with one held-out block of 1,024, and 51 % with six.
ENOUGH = 6 * 1024


def above(scores: Tensor, threshold: Tensor | float, most: int) -> Tensor:
    """The experts (T, most) int64 of scores (T, E) above the threshold, -1 in the places left empty.

    Of more than `most`, those with the highest scores; NaN is above nothing.
    """
    experts = highest(scores, min(most, scores.shape[1]))
    return experts.where(scores.gather(1, experts) > threshold, -1)


def highest(scores: Tensor, k: int) -> Tensor:
    """The experts (T, k) int64 with the highest scores (T, E); of equal ones the lower, as in the native kernel.

    NaN is lower than all. CMoE's representative of a ReLU expert scores 0 for most tokens; `topk` takes any of those.
    """
    finite = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return finite.sort(dim=1, descending=True, stable=True).indices[:, :k]


@torch.no_grad()
def set_threshold(routers: Mapping[int, Router], stats: NeuronStats, weights: MoEWeights) -> float:
    """Set and return the threshold of the first router: the spec's `top_k` experts a token on average.

    `routers` are alike, by the part of the calibration that each was not fitted to, and score that: on tokens that
    a router was fitted to, its scores spread wider. Raises ValueError if the spec's `most` is below that average:
    no threshold can reach it.
    """
    router = next(iter(routers.values()))
    mean, most = router.spec.top_k, router.spec.most
    if mean > most:
        raise ValueError(f"at most {most} experts a token cannot be {mean} on average")
    scores = [_scores(each, stats, weights, part) for part, each in routers.items()]
    high = _threshold(torch.cat(scores), mean, most)
    assert router.threshold is not None
    router.threshold.fill_(high)
    return high


def _threshold(scores: Tensor, mean: int, most: int) -> float:
    """The least float32 threshold that no more than `mean` experts a token are above, of a token's at most `most`."""
    low, high = scores.min().nextafter(torch.tensor(-torch.inf)).item(), scores.max().item()
    if mean >= min(most, scores.shape[1]):
        return low
    while low < (middle := torch.tensor((low + high) / 2).item()) < high:  # bisection, 20 to 40 times
        found = (scores > middle).sum(1).clamp_max(most).double().mean().item()
        low, high = (middle, high) if found > mean else (low, middle)
    return high


def held_out_parts(stats: NeuronStats, enough: int = ENOUGH) -> list[int]:
    """The parts to set a threshold on: the last, and before it as many as it takes to have `enough` tokens."""
    if stats.tokens < 2 * HELD_OUT:
        return [HELD_OUT - 1]  # every part is all of the tokens
    sizes = [stats.held_out_tokens(part) for part in reversed(range(HELD_OUT))]
    count = next((i + 1 for i in range(HELD_OUT) if sum(sizes[: i + 1]) >= enough), HELD_OUT)
    return [HELD_OUT - 1 - i for i in range(count)]


def _scores(router: Router, stats: NeuronStats, weights: MoEWeights, part: int) -> Tensor:
    step = -(-stats.tokens * 4 * router.spec.experts // HOLD_BYTES)
    found, start = [], 0
    for x, held in stats.split_inputs(part):
        rows = x[held]
        found.append(router(rows[thinned(start, step)], weights).float())
        start += len(rows)
    return torch.cat(found)
