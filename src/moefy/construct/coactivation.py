"""Co-activation graph: experts of neurons that fire for the same tokens (MoEfication, section 3.1).

The weight of an edge is the sum over tokens of h_n h_m where both neurons fire. METIS cuts the graph into
parts that lose little weight between them; the published code then evens out the sizes by moving random
neurons, here they are evened out by balanced assignment on the edge weight itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moefy.construct.balanced import balanced_assignment, rows_of
from moefy.errors import MoefyError
from moefy.stats import NeuronStats, firing

# Edges that METIS sees of each neuron, its heaviest. On 4,096 neurons METIS takes 1.4 s for them against 7.3 s
# and 0.8 GiB more for the full graph, and the evened experts hold 1 % more edge weight.
NEIGHBOURS = 128
# METIS counts in 32-bit integers; the sum of all edge weights stays below this.
TOTAL_WEIGHT = 1 << 29
# Assignment rounds at most, where each moves fewer neurons than the one before.
ROUNDS = 20


def group(stats: NeuronStats, members: Tensor, experts: int, seed: int) -> Tensor:
    """Cut the neurons `members` (N,) into (E, M) rows by which of them fire together.

    Raises MoefyError if there are fewer calibration tokens than experts: such a graph has nothing to cut.
    """
    if stats.tokens < experts:
        raise MoefyError(
            f"The co-activation graph of {stats.name} needs at least one calibration token for each of its "
            f"{experts} experts, and there are {stats.tokens}; give more text, or use the construction weights."
        )
    if experts == 1:
        return members[None].clone()
    weights = coactivation(stats, members)
    assignment = equalised(weights, _metis(weights, experts, seed), experts)
    return rows_of(assignment, members, experts)


def coactivation(stats: NeuronStats, members: Tensor) -> Tensor:
    """The edge weights (N, N) between `members`, float32; the diagonal holds each neuron's own squares.

    Only blocks on and above the diagonal are computed, 5/8 of the multiply-adds of HᵀH.
    """
    ffn, neurons = stats.ffn.take(members), len(members)
    weights = torch.zeros(neurons, neurons)
    starts = range(0, neurons, max(256, -(-neurons // 4)))
    for x in stats.inputs():
        h = firing(ffn, x)
        for start in starts:
            stop = min(start + starts.step, neurons)
            weights[start:stop, start:].addmm_(h[:, start:stop].t(), h[:, start:])
    return weights.triu_() + weights.triu(1).t()


def equalised(weights: Tensor, parts: Tensor, experts: int) -> Tensor:
    """Experts of equal size (N,) from `parts` (N,) of any size, with the least loss of edge weight inside them.

    Each round gives every neuron to the expert that its edges lead to, by exact balanced assignment.
    `weights` is a Gram matrix, so the weight inside experts is convex in the assignment, and a round
    that maximises its linear part never loses any.
    """
    best, held = parts, -1.0
    for _ in range(ROUNDS):
        ties = weights @ torch.nn.functional.one_hot(best, experts).float()
        candidate = balanced_assignment(-ties / ties.max().clamp_min(1e-30))
        inside = inside_weight(weights, candidate)
        if inside <= held * (1 + 1e-6):
            break
        best, held = candidate, inside
    return best


def inside_weight(weights: Tensor, assignment: Tensor) -> float:
    """The share of the edge weight that joins neurons of the same expert."""
    diagonal = weights.diagonal().double().sum()
    inside = torch.nn.functional.one_hot(assignment).float()
    total = weights.sum(dtype=torch.float64) - diagonal
    return float(((weights @ inside) * inside).sum(dtype=torch.float64) - diagonal) / max(float(total), 1e-30)


def _metis(weights: Tensor, parts: int, seed: int) -> Tensor:
    """METIS's k-way parts (N,) of the graph of each neuron's heaviest edges; nearly but not exactly equal."""
    import pymetis  # only this construction needs it

    rows, columns, values = _sparsified(weights)
    neighbours = np.bincount(rows, minlength=len(weights))
    scale = TOTAL_WEIGHT / max(float(values.sum()), 1e-30)
    _, found = pymetis.part_graph(
        parts,
        pymetis.CSRAdjacency(np.concatenate([[0], neighbours.cumsum()]), columns),
        eweights=np.maximum(values * scale, 1).astype(np.int64),
        recursive=False,
        options=pymetis.Options(seed=seed),
    )
    return torch.as_tensor(np.asarray(found), dtype=torch.long)


def _sparsified(weights: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, column, weight) of every edge that is among the heaviest of either of its ends, sorted by row."""
    edges = weights.clone().fill_diagonal_(0)
    kept = edges.topk(min(NEIGHBOURS, len(edges) - 1), dim=1)
    keep = torch.zeros_like(edges, dtype=torch.bool).scatter_(1, kept.indices, kept.values > 0)
    rows, columns = (keep | keep.t()).nonzero(as_tuple=True)
    return rows.numpy(), columns.numpy(), edges[rows, columns].double().numpy()
