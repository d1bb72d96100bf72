"""Conditional FFN on `torch.nn.functional.grouped_mm`: tokens sorted by expert, one call a matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moefy.types import MoEWeights

# Bytes of inputs gathered for their experts at a time: 1,024 tokens that run 340 experts each of a layer as wide as
# Llama-7B's would be 5.7 GB.
GATHERED_BYTES = 1 << 28


def moe_ffn(x: Tensor, weights: MoEWeights, chosen: Tensor, expert_weight: Tensor | None = None) -> Tensor:
    """Same contract as `reference.moe_ffn`; gathers tokens in slices."""
    slices = -(-int((chosen >= 0).sum()) * x.shape[1] * x.element_size() // GATHERED_BYTES)
    if slices <= 1:
        return _slice(x, weights, chosen, expert_weight)
    rows = -(-len(x) // slices)
    weight = [None] * slices if expert_weight is None else expert_weight.split(rows)
    parts = zip(x.split(rows), chosen.split(rows), weight, strict=False)
    return torch.cat([_slice(some, weights, theirs, w) for some, theirs, w in parts])


def _slice(x: Tensor, weights: MoEWeights, chosen: Tensor, expert_weight: Tensor | None) -> Tensor:
    accumulate = torch.promote_types(x.dtype, torch.float32)
    y = weights.shared.forward(x).to(accumulate)
    pairs = (chosen >= 0).nonzero()
    if len(pairs):
        token, slot = pairs.unbind(1)
        expert = chosen[token, slot]
        order = expert.argsort(stable=True)
        token, slot, expert = token[order], slot[order], expert[order]
        out = _experts(x[token], weights, expert).to(accumulate)
        if expert_weight is not None:
            out = out * expert_weight[token, slot, None].to(accumulate)
        y = y.index_add(0, token, out)
    if weights.bias is not None:
        y = y + weights.bias
    return y.to(x.dtype)


def _experts(x: Tensor, weights: MoEWeights, expert: Tensor) -> Tensor:
    """Outputs (N, D) of inputs (N, D) sorted by the expert (N,) that each goes to."""
    routed, act = weights.routed, weights.routed.act()
    shape = (weights.experts, weights.expert_size, routed.width)
    ends = torch.bincount(expert, minlength=weights.experts).cumsum(0).to(torch.int32)

    def rows(matrix: Tensor, bias: Tensor | None) -> Tensor:
        out = F.grouped_mm(x, matrix.view(shape).transpose(1, 2), offs=ends)
        return out if bias is None else out + bias.view(shape[:2])[expert]

    h = rows(routed.up, routed.up_bias)
    if routed.gate is None:
        h = act(h)
    else:
        h = act(rows(routed.gate, routed.gate_bias)) * (act(h) if routed.activate_up else h)
    return F.grouped_mm(h, routed.down.view(shape), offs=ends)


def supports(x: Tensor, weights: MoEWeights) -> bool:
    """grouped_mm wants rows of a multiple of 16 bytes and 16- or 32-bit floats."""
    size = x.element_size()
    return (
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weights.routed.up.dtype == x.dtype
        and weights.experts > 0
        and weights.expert_size * size % 16 == 0
        and x.shape[1] * size % 16 == 0
    )
