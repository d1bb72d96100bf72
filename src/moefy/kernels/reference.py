"""The loop over experts: the specification of a conditional FFN. Slow, and what every fast path must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.types import FFNWeights, MoEWeights


def moe_ffn(x: Tensor, weights: MoEWeights, chosen: Tensor, expert_weight: Tensor | None = None) -> Tensor:
    """Output (T, D): the shared neurons, the chosen experts and the bias.

    x (T, D); chosen (T, K) int64, an entry below 0 chooses nothing; expert_weight (T, K) multiplies the
    output of each chosen expert (1 if None). Sums are kept in float32 or better.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    y = weights.shared.forward(x).to(accumulate)
    for expert in range(weights.experts):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        out = expert_ffn(weights, expert).forward(x[token]).to(accumulate)
        if expert_weight is not None:
            out = out * expert_weight[token, slot, None].to(accumulate)
        y = y.index_add(0, token, out)
    if weights.bias is not None:
        y = y + weights.bias
    return y.to(x.dtype)


def expert_ffn(weights: MoEWeights, expert: int) -> FFNWeights:
    """One routed expert as a small dense FFN."""
    size = weights.expert_size
    return weights.routed.slice(expert * size, (expert + 1) * size)
