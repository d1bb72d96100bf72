"""Random experts: a seeded shuffle (MoEfication, section 3.1's baseline)."""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.stats import NeuronStats


def group(stats: NeuronStats, members: Tensor, experts: int, seed: int) -> Tensor:
    """Cut the neurons `members` into (E, M) rows at random."""
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed))
    return members[order].view(experts, -1).sort(dim=1).values
