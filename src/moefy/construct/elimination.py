"""In which order neurons can go: the cheapest first, all that are left refitted after each block.

Optimal brain surgeon on a whole FFN: with H the Gram matrix of the activations, losing the neurons B costs
tr(W_Bᵀ [(H⁻¹)_BB]⁻¹ W_B · metric) once the others' down-projection is refitted, and both H⁻¹ and W change
with it. So errors of the same activations in many neurons are repaired by those that stay, and are not
counted for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from moefy.errors import MoefyError
from moefy.stats import NeuronStats

# Neurons that go at a time: F / 96. On SmolLM2 blocks of 8 leave 0-3 % less error than one shot.
BLOCKS = 96
# Relative to each neuron's mean square: keeps the Gram invertible with fewer tokens than neurons. Relative to the mean
# of all it swamps neurons that fire weakly and have large weights in `down`, though only the product of both counts:
# in SmolLM2's last layer the costs were 1.4 to 7.8 times what a refit without damping leaves, and are 1.01 to 1.13.
DAMPING = 1e-4
# Neurons whose mean square is less than this of the mean are as good as dead.
DEAD = 1e-12
# Rows of neurons that are gone are cut out of the matrices when they are more than this share of them.
SPARSE = 0.25
# Of float64 matrices: the Gram's, its inverse and two of their size at a time.
_BYTES = 4 * 8


@dataclass(frozen=True)
class Elimination:
    """`order` (F,): neurons as they went, the cheapest first. `cost[i]`: squared error, summed over the
    weighted calibration tokens and in their metric, once order[: i + 1] are gone and the others refitted."""

    order: Tensor
    cost: Tensor


def check_room(neurons: int) -> None:
    """MoefyError if there is less memory than `eliminate` takes; Linux ends a process without a word."""
    needed, free = _BYTES * neurons**2, psutil.virtual_memory().available + psutil.swap_memory().free
    if needed > free:
        raise MoefyError(
            f"FFNs of {neurons:,} neurons take {needed / 2**30:.0f} GiB for this recipe, and {free / 2**30:.0f} GiB of "
            f"memory are free; use the recipe cmoe, which makes no matrix of neurons by neurons, or a larger machine."
        )


def eliminate(stats: NeuronStats) -> Elimination:
    """Remove every neuron of an FFN, a block at a time. F³ multiply-adds in float64, _BYTES·F² bytes."""
    squares = stats.gram.diagonal()
    size = squares.clamp_min(DEAD * squares.mean() + 1e-300).sqrt()  # from here on activations are in units of it
    inverse = _inverse(stats.gram, size)
    w = _in_metric(stats.ffn.down.double() * size[:-1, None], stats.metric)
    left = torch.arange(stats.ffn.neurons)
    block, spent = max(1, stats.ffn.neurons // BLOCKS), 0.0
    order: list[Tensor] = []
    cost: list[float] = []
    out = torch.zeros(len(left), dtype=torch.bool)
    while len(cost) < stats.ffn.neurons:
        saliency = w.square().sum(1) / inverse.diagonal()[:-1].clamp_min(1e-30)
        count = min(block, stats.ffn.neurons - len(cost))
        gone = saliency.masked_fill_(out, torch.inf).topk(count, largest=False, sorted=True).indices
        within = torch.linalg.inv(inverse[gone][:, gone])
        across, change = inverse[:, gone], within @ w[gone]
        spent += float((change * w[gone]).sum())
        order.append(left[gone])
        cost += [spent] * count
        w -= across[:-1] @ change
        inverse.addmm_(across @ within, across.t(), alpha=-1)
        out[gone] = True
        if out.sum() > SPARSE * len(out):
            keep = (~out).nonzero().flatten()
            left, w, out = left[keep], w[keep], out[keep]
            keep = torch.cat([keep, torch.tensor([len(inverse) - 1])])
            inverse = inverse[keep][:, keep]
    return Elimination(torch.cat(order), torch.tensor(cost, dtype=torch.float64))


def _inverse(gram: Tensor, size: Tensor) -> Tensor:
    """The inverse of a Gram matrix in units of `size`, damped by as much as it takes: tokens that are all alike give it
    one direction."""
    for damping in (DAMPING, 100 * DAMPING, 1.0):
        damped = (gram / size[:, None]).div_(size)
        damped.diagonal().add_(damping)
        root, failed = torch.linalg.cholesky_ex(damped, out=(damped, torch.empty(0, dtype=torch.int32)))
        if not failed:
            return torch.cholesky_inverse(root)
    raise MoefyError("The tokens of the calibration give no usable statistics; check the calibration data.")


def _in_metric(down: Tensor, metric: Tensor | None) -> Tensor:
    """Rows whose squared length is what they cost: down @ L with L·Lᵀ = metric. All that follows is linear in them."""
    if metric is None:
        return down
    metric = metric.double()
    mean, identity = metric.diagonal().mean(), torch.eye(len(metric), dtype=torch.float64)
    # A metric from few tokens is singular, and the rounding of its float32 sums is relative to its largest eigenvalue.
    for jitter in (1e-6, 1e-4, 1e-2, 1.0):
        root, failed = torch.linalg.cholesky_ex(metric + (jitter * mean + 1e-30) * identity)
        if not failed:
            return down @ root
    raise MoefyError("The gradients of the calibration give no usable metric; check the calibration data.")
