"""Closed-form correction of a converted FFN: the down-projection refitted to the dense output.

With H the hidden activations as routed (zero where an expert does not run) and Y the dense FFN's output on
the same inputs, W, b minimise  sum_t w_t ‖Y - H W - b‖² + λ ‖diag(G)^½ (W - W₀)‖²,  G = HᵀH. Nothing is
trained: one pass over the calibration accumulates G and HᵀR in float64, R = Y - H W₀ - b₀, and a Cholesky
factorisation solves for the change. MoEfication's calibration of the second layer is this with λ = 0.
Y may also make up for a share of what the layers before have lost: what they left out is in the residual stream,
and an FFN that gives back half of it costs no multiply-add (docs/log.md: 12 % of the perplexity at 25 %).
For F = 14,336 G takes 1.6 GiB, and T·F² + F³/3 multiply-adds go into a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.moe import MoEFFN
from moefy.stats import NeuronStats, as_mask
from moefy.types import FFNWeights, products

# The ridge is the one of these with the least error on the held-out tokens, relative to diag(G). They are whole
# blocks of text: with every eighth token held out instead, whose neighbours are not, 0.1 was chosen where 1 leaves
# 9 % less error on other documents (routed, 25 %, layer 8 of SmolLM2).
RIDGES = (1e-2, 1e-1, 3e-1, 1.0, 3.0)
# Held-out blocks are of the same documents as the rest: of ridges that leave nearly as little error there, the
# largest is the safest on others.
NEARLY = 1.02
# Outputs that are compared: with all 4,096 of Llama-7B five solves are more multiply-adds than all else in a layer.
COMPARED = 1024


@dataclass(frozen=True)
class Fit:
    """The ridge of a refit, and the squared error, summed, that it left on tokens that were held out to choose it."""

    ridge: float
    held_out_error: float


@torch.no_grad()
def refit(moe: MoEFFN, ffn: FFNWeights, stats: NeuronStats, repair: float = 0.0) -> Fit:
    """Replace the down-projection and the output bias of `moe` by their least-squares fit.

    `ffn` is the dense FFN in float32, `stats` its calibration. The bias is only fitted where the MoEFFN has one.
    `repair` is the share of `stats.targets` in what is fitted, the rest is the dense FFN's output. An eighth of
    the tokens is held out to choose the ridge; the final fit uses all.
    """
    dense, biased = moe.to_dense().to(torch.float32), moe.down_bias is not None
    width = ffn.neurons + biased
    gram = torch.zeros(2, width, width, dtype=torch.float64)
    cross = torch.zeros(2, width, ffn.width, dtype=torch.float64)
    held_error = torch.zeros(ffn.width, dtype=torch.float64)
    for (x, full, y, held), target in zip(stats.split_activations(), stats.target_chunks(), strict=False):
        h = full * runs(moe, x)
        if target is not None:
            y = y.lerp(target, repair)
        rest = y - dense.forward_hidden(h)
        if biased:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        scale = stats.token_weight(y).sqrt()[:, None]
        h, rest = h.mul_(scale), rest.mul_(scale)
        held_error += rest[held].square().sum(0)
        for part, rows in enumerate((~held, held)):
            if rows.any():  # a chunk is mostly of one part, and need not be copied then
                some_h, some_rest = (h, rest) if rows.all() else (h[rows], rest[rows])
                gram[part] += products(some_h, some_h)
                cross[part] += products(some_h, some_rest)
    fit = _largest_good(gram, cross, held_error)
    change = _solve(gram[0].add_(gram[1]), cross.sum(0), fit.ridge).float()
    rows = dense.down + change[: ffn.neurons]
    order = moe.neurons.long()  # type: ignore[operator]
    shared, experts = rows[order].split([moe.spec.shared, moe.spec.neurons - moe.spec.shared])
    moe.get_parameter("shared_down").copy_(shared)
    moe.get_parameter("experts_down").copy_(experts.view_as(moe.get_parameter("experts_down")))
    if biased:
        moe.down_bias.add_(change[-1].to(moe.down_bias.dtype))  # type: ignore[union-attr]
    return fit


def runs(moe: MoEFFN, x: Tensor) -> Tensor:
    """1 for the neurons (t, F), in the dense order, that run for inputs (t, D), 0 for the others."""
    mask = x.new_ones(len(x), moe.spec.neurons)
    routed = moe.neurons.long()[moe.spec.shared :]  # type: ignore[operator]
    picked = as_mask(moe.route(x), moe.spec.experts).to(x.dtype)
    mask[:, routed] = picked.repeat_interleave(max(moe.spec.expert_size, 1), dim=1)
    return mask


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    diagonal = gram.diagonal()
    # A neuron that never runs has a zero row: any positive penalty leaves its weights as they are.
    penalised = gram.clone()
    penalised.diagonal().add_(ridge * diagonal + 1e-9 * diagonal.mean() + 1e-30)
    # In place: a matrix takes 1.6 GiB for F = 14,336.
    return torch.cholesky_solve(cross, torch.linalg.cholesky(penalised, out=penalised))


def _largest_good(gram: Tensor, cross: Tensor, before: Tensor) -> Fit:
    """The largest ridge whose fit on the one part leaves nearly as little of the other's error as the best.

    `before` (D,) is the held-out error of each output before the fit. Some of the outputs will do to choose. With the
    ridge the error falls and then rises: from the largest down, the first that leaves more than the best ends it.
    """
    some = torch.linspace(0, len(before) - 1, min(len(before), COMPARED)).long()
    cross, start = cross[:, :, some], before[some].sum().item()
    left: dict[float, float] = {}
    for ridge in sorted(RIDGES, reverse=True):
        left[ridge] = max(0.0, start + _held_out_error(gram, cross, ridge))
        if left[ridge] > min(left.values()):
            break
    ridge = max(ridge for ridge, error in left.items() if error <= NEARLY * min(left.values()))
    return Fit(ridge, left[ridge])


def _held_out_error(gram: Tensor, cross: Tensor, ridge: float) -> float:
    """Squared error on the held-out tokens after fitting on the others, up to a constant."""
    change = _solve(gram[0], cross[0], ridge)
    return ((change * (gram[1] @ change)).sum() - 2 * (change * cross[1]).sum()).item()
