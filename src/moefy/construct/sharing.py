"""Which neurons are shared, that is, always run: those with the highest scores (F,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefy.stats import NeuronStats, token_weight


def rate(stats: NeuronStats) -> Tensor:
    """CMoE (section 4.1): how often a neuron is among a token's most activated."""
    return stats.rates


def reconstruction(stats: NeuronStats) -> Tensor:
    """What losing each neuron (F,) costs once the others are refitted: ‖w_down‖² / [H⁻¹]_nn (optimal brain surgeon).

    H is the Gram matrix of the dense activations, token-weighted as in `refit`.
    """
    ffn = stats.ffn
    weight = token_weight(ffn, stats)
    gram = torch.zeros(ffn.neurons, ffn.neurons, dtype=torch.float64)
    for x in stats.inputs():
        h = ffn.hidden(x)
        h = h * weight(h @ ffn.down if ffn.down_bias is None else h @ ffn.down + ffn.down_bias).sqrt()[:, None]
        gram += h.t() @ h
    # 1e-4 keeps the factorisation going with fewer tokens than neurons; 1e-6 to 1e-3 choose the same 95 %.
    gram.diagonal().add_(1e-4 * gram.diagonal().mean() + 1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    return ffn.down.double().square().sum(1) / inverse.diagonal()


SHARING: dict[str, Callable[[NeuronStats], Tensor]] = {
    "rate": rate,
    "reconstruction": reconstruction,
}
