"""Clusters of neurons that matter for the same tokens, after the shared neurons have repaired what they can.

Balanced k-means over what losing each neuron costs on a few thousand tokens, as directions: its activation
less what the shared neurons predict of it, times the length of its row of the down-projection.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.construct.balanced import balanced_kmeans, rows_of
from moefy.stats import NeuronStats, left_unpredicted, thinned

# Tokens that the clusters are seen on, thinned evenly; the features of F 11,008 take 90 MB.
TOKENS = 2048


def group(stats: NeuronStats, members: Tensor, experts: int, seed: int) -> Tensor:
    """Cut the neurons `members` into (E, M) rows by the tokens they matter for; all others count as shared."""
    rest = torch.ones(stats.ffn.neurons, dtype=torch.bool)
    rest[members] = False
    left = left_unpredicted(stats, rest.nonzero().flatten(), members)
    step, start, rows = max(1, stats.tokens // TOKENS), 0, []
    for x in stats.inputs():
        rows.append(left(stats.ffn.hidden(x[thinned(start, step)])).abs())
        start += len(x)
    down = stats.ffn.down[members]
    weighted = down if stats.metric is None else down @ stats.metric
    size = (weighted * down).sum(1).clamp_min(0).sqrt()
    return rows_of(
        balanced_kmeans(F.normalize(torch.cat(rows).t() * size[:, None], dim=1), experts, seed), members, experts
    )
