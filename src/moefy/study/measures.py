"""Figures of one layer, or of two: sparsity, activation rates, load, and how much choices have in common."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moefy.stats import as_mask

BINS = 50
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Pairs of tokens and of sequences that an overlap is averaged over.
PAIRS = 4096


def sparsity(active: Tensor) -> dict[str, Any]:
    """The distribution of the share of neurons that a token activates (T,)."""
    return {
        "mean": float(active.mean()),
        "quantiles": dict(zip(map(str, QUANTILES), active.quantile(torch.tensor(QUANTILES)).tolist(), strict=True)),
        "tokens_under_5_percent": float((active < 0.05).float().mean()),
        "tokens_under_10_percent": float((active < 0.10).float().mean()),
        "histogram": histogram(active),
    }


def rates(rate: Tensor) -> dict[str, Any]:
    """The distribution of the neurons' activation rates (F,), and whether it has two humps.

    Sarle's coefficient (skewness² + 1) / kurtosis is 5/9 for a uniform distribution and above for bimodal or
    very skewed ones; `valley` asks for two humps outright: the lowest density between the fullest bin of either
    half and the lower of the two, 1 for no valley.
    """
    centred = rate.double() - rate.double().mean()
    variance = float(centred.square().mean())
    skewness = float((centred**3).mean()) / max(variance, 1e-30) ** 1.5
    kurtosis = float((centred**4).mean()) / max(variance, 1e-30) ** 2
    return {
        "mean": float(rate.mean()),
        "never": float((rate == 0).float().mean()),
        "over_half": float((rate > 0.5).float().mean()),
        "bimodality": (skewness**2 + 1) / max(kurtosis, 1e-12),
        "valley": _valley(rate),
        "histogram": histogram(rate),
    }


def _valley(rate: Tensor) -> float:
    density = torch.histc(rate.float(), bins=20, min=0, max=max(float(rate.max()), 1e-9))
    left, right = int(density[:10].argmax()), 10 + int(density[10:].argmax())
    peak = min(float(density[left]), float(density[right]))
    return float(density[left : right + 1].min()) / peak if peak else 1.0


def histogram(values: Tensor) -> list[float]:
    """Shares of the values in BINS equal bins of 0 to 1."""
    return (torch.histc(values.float(), bins=BINS, min=0, max=1) / max(1, len(values))).tolist()


def load(chosen: Tensor, experts: int) -> dict[str, Any]:
    """How evenly choices (T, K) fall on the experts: shares, and what sums them up."""
    counts = torch.bincount(chosen[chosen >= 0].long(), minlength=experts).double()
    share = counts / counts.sum().clamp_min(1)  # thresholds may leave all of them out
    ordered = share.sort().values
    rank = torch.arange(1, experts + 1, dtype=torch.float64)
    entropy = -(share * share.clamp_min(1e-30).log()).sum()
    return {
        "share": [round(v, 6) for v in share.tolist()],
        "imbalance": float(share.max() * experts),
        "deviation": float(share.std(unbiased=False) * experts),
        "gini": float((2 * rank - experts - 1) @ ordered / experts),
        "evenness": float(entropy) / math.log(experts) if experts > 1 else 1.0,
        "never_chosen": int((counts == 0).sum()),
    }


def between_inputs(
    chosen: Tensor, sequences: Tensor, experts: int, seed: int = 0, places: Tensor | None = None
) -> dict[str, float]:
    """Share of experts in common (of K): neighbours in a sequence, any two tokens, and chance (K / E).

    `sequence_similarity` is the mean cosine of two sequences' expert loads. `places` (T,) are the tokens' places in
    their text where others lie between them.
    """
    generator = torch.Generator().manual_seed(seed)
    picked = as_mask(chosen, experts).float()
    top_k = float(picked.sum(1).mean())
    together = sequences[1:] == sequences[:-1]
    if places is not None:
        together &= places[1:] == places[:-1] + 1
    near = together.nonzero().flatten()
    near = near[torch.randperm(len(near), generator=generator)[:PAIRS]]
    a, b = (torch.randint(len(chosen), (PAIRS,), generator=generator) for _ in range(2))
    apart = sequences[a] != sequences[b]
    loads = torch.zeros(int(sequences.max()) + 1, experts).index_add_(0, sequences, picked)
    loads = torch.nn.functional.normalize(loads[loads.sum(1) > 0], dim=1)
    c, d = (torch.randint(max(1, len(loads)), (PAIRS if len(loads) else 0,), generator=generator) for _ in range(2))
    many = max(top_k, 1e-12)
    return {
        "neighbours": _mean((picked[near] * picked[near + 1]).sum(1) / many),
        "other_sequences": _mean((picked[a] * picked[b]).sum(1)[apart] / many),
        "chance": top_k / experts,
        "sequence_similarity": _mean((loads[c] * loads[d]).sum(1)[c != d]),
    }


def between_layers(first: Tensor, second: Tensor, experts: tuple[int, int]) -> dict[str, Any]:
    """How far the experts of one layer tell those of the next, for the same tokens' choices (T, K) each.

    `lift` (E1, E2) is the joint count over what independence gives; `strongest` the mean over the first
    layer's experts of their highest correlation with one of the second's.
    """
    a, b = (as_mask(t, e).float() for t, e in zip((first, second), experts, strict=True))
    pa, pb = a.mean(0), b.mean(0)
    joint = a.t() @ b / len(a)
    spread = (pa * (1 - pa))[:, None].sqrt() * (pb * (1 - pb))[None].sqrt()
    correlation = (joint - pa[:, None] * pb) / spread.clamp_min(1e-9)
    lift = joint / (pa[:, None] * pb).clamp_min(1e-12)
    used = pa > 0
    return {
        "strongest": float(correlation[used].max(dim=1).values.mean()) if used.any() else 0.0,
        "lift": [[round(v, 3) for v in row] for row in lift.tolist()],
    }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
