"""Parameter clustering: experts of neurons with similar input weights (MoEfication, section 3.1).

Balanced k-means over the L2-normalised rows of the first layer (the gate's rows when there is a gate,
because the gate decides what fires). The paper uses constrained k-means; here every assignment step is
an exact optimal transport.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.construct.balanced import balanced_assignment, rows_of
from moefy.stats import NeuronStats
from moefy.types import linear

# Centroids of 1,536 x 8 settle in 5 to 8 rounds; later rounds move a handful of neurons.
ROUNDS = 10


def group(stats: NeuronStats, members: Tensor, experts: int, seed: int) -> Tensor:
    """Cut the neurons `members` into (E, M) rows by the direction of their input weights."""
    ffn = stats.ffn
    rows = F.normalize((ffn.up if ffn.gate is None else ffn.gate)[members], dim=1)
    centroids = _spread_seeds(rows, experts, torch.Generator().manual_seed(seed))
    assignment = torch.full((len(members),), -1)
    for _ in range(ROUNDS):
        # For rows of unit length the squared distance is 1 + |c|² - 2 x·c.
        cost = centroids.square().sum(1) - 2 * linear(rows, centroids)
        before, assignment = assignment, balanced_assignment(cost)
        if torch.equal(before, assignment):
            break
        sums = torch.zeros_like(centroids).index_add_(0, assignment, rows)
        centroids = sums / (len(members) // experts)
    return rows_of(assignment, members, experts)


def _spread_seeds(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeding of unit rows: the further from the seeds so far, the likelier (by squared distance)."""

    def distance(to: int) -> Tensor:
        return (2 - 2 * rows @ rows[to]).clamp_min(0)

    chosen = [int(torch.randint(len(rows), (), generator=generator))]
    nearest = distance(chosen[0])
    for _ in range(count - 1):
        weights = nearest if nearest.sum() > 0 else torch.ones(len(rows))
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, distance(chosen[-1]))
    return rows[chosen]
