"""Parameter clustering: experts of neurons with similar input weights (MoEfication, section 3.1).

Balanced k-means over the L2-normalised rows of the first layer (the gate's rows when there is a gate,
because the gate decides what fires). The paper uses constrained k-means; here every assignment step is
an exact optimal transport.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from moefy.construct.balanced import balanced_kmeans, rows_of
from moefy.stats import NeuronStats


def group(stats: NeuronStats, members: Tensor, experts: int, seed: int) -> Tensor:
    """Cut the neurons `members` into (E, M) rows by the direction of their input weights."""
    ffn = stats.ffn
    rows = F.normalize((ffn.up if ffn.gate is None else ffn.gate)[members], dim=1)
    return rows_of(balanced_kmeans(rows, experts, seed), members, experts)
