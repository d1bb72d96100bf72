"""Which neurons always run, and how the others are grouped into experts.

A construction is a function `group(stats, members, experts, seed) -> (E, M)` in a file of its own and
one line in CONSTRUCTIONS.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefy.construct import activation, coactivation, contribution, random, weights
from moefy.construct.sharing import SHARING
from moefy.stats import NeuronStats
from moefy.types import LayerSpec, Partition

Group = Callable[[NeuronStats, Tensor, int, int], Tensor]

CONSTRUCTIONS: dict[str, Group] = {
    "activation": activation.group,
    "weights": weights.group,
    "coactivation": coactivation.group,
    "contribution": contribution.group,
    "random": random.group,
    # The control: the neurons that are not shared are never run, so how they are grouped is of no matter.
    "shared_only": random.group,
}


def construct(
    method: str, spec: LayerSpec, stats: NeuronStats, seed: int, sharing: str = "rate", scores: Tensor | None = None
) -> Partition:
    """Cut an FFN's neurons: the `spec.shared` best by `sharing` are shared, the rest become experts by `method`.

    `scores` (F,) are those of `sharing` if the caller has them already.
    """
    if scores is None and spec.shared:  # without shared experts they are not needed
        scores = SHARING[sharing](stats)
    shared = torch.empty(0).long() if scores is None else scores.topk(spec.shared).indices.sort().values
    rest = torch.ones(spec.neurons, dtype=torch.bool)
    rest[shared] = False
    members = rest.nonzero().flatten()
    if spec.experts == 0:
        return Partition(shared=shared, experts=torch.empty(0, 0, dtype=torch.long))
    return Partition(shared=shared, experts=CONSTRUCTIONS[method](stats, members, spec.experts, seed))
