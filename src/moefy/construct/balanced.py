"""Exact assignment of neurons to experts of equal size: optimal transport with uniform marginals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def balanced_assignment(cost: Tensor) -> Tensor:
    """Give each of N items to one of E groups of N/E, at least total cost; (N, E) costs -> (N,) group.

    Solved as a transport problem by POT's network simplex, whose optimum with integer marginals is
    integral; it equals the linear assignment on repeated columns at a fraction of the work
    (1,152 x 12: 0.01 s against 0.98 s).
    """
    import ot  # 0.5 s to import, and only conversions need it

    items, groups = cost.shape
    if items % groups:
        raise ValueError(f"{items} items do not divide into {groups} equal groups")
    if groups == 1:
        return torch.zeros(items, dtype=torch.long)
    plan = ot.emd(
        np.ones(items),
        np.full(groups, items / groups),
        np.ascontiguousarray(cost.double().numpy()),
        numItermax=10_000_000,
    )
    return torch.from_numpy(np.asarray(plan).argmax(axis=1))


def rows_of(assignment: Tensor, members: Tensor, groups: int) -> Tensor:
    """The groups as index rows (E, M) of `members`, each in ascending order."""
    return members[assignment.argsort(stable=True)].view(groups, -1).sort(dim=1).values
