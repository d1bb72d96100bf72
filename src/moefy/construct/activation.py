"""CMoE's experts: neurons that the same tokens mark (arXiv 2502.04416, section 4.1).

Centroids are the marker columns of the neurons with the highest rates; every neuron goes to a centroid
by balanced assignment under the L1 distance. The published code makes one round; so do we.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.construct.balanced import balanced_assignment, rows_of
from moefy.stats import NeuronStats


def group(stats: NeuronStats, members: Tensor, experts: int, seed: int) -> Tensor:
    """Cut the neurons `members` into (E, M) rows by what activates them."""
    seeds = members[stats.rates[members].topk(experts).indices]
    return rows_of(balanced_assignment(marker_distances(stats, members, seeds)), members, experts)


def marker_distances(stats: NeuronStats, members: Tensor, seeds: Tensor) -> Tensor:
    """L1 distances (N, E) between the marker columns of `members` and those of `seeds`, exact integers.

    For 0/1 columns |a - b| sums to |a| + |b| - 2 a·b, so counts of joint marks are all it takes.
    """
    counts, joint = torch.zeros(stats.ffn.neurons), torch.zeros(len(members), len(seeds))
    for marks in stats.marker_chunks():
        counts += marks.sum(0)
        joint += marks[:, members].t() @ marks[:, seeds]
    return counts[members][:, None] + counts[seeds] - 2 * joint
