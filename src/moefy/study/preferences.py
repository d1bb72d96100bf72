"""Which tokens each expert prefers, and whether that is more than chance: permutation tests.

The statistic of an expert and a class of tokens is how many of the class chose the expert. Its distribution
under chance comes from shuffling the classes: over all tokens, within each sequence (parts of a sequence) or
over whole sequences (labels), so that tokens that belong together stay so. p = (1 + hits) / (1 + shuffles), and
Benjamini-Hochberg's q over everything tested in the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moefy.stats import as_mask

SHUFFLES = 400
SIGNIFICANT = 0.05

Shuffle = Callable[[Tensor, torch.Generator], Tensor]


def preferences(
    chosen: Tensor, classes: Tensor, names: list[str], shuffle: Shuffle, experts: int, seed: int = 0
) -> dict[str, Any]:
    """What experts (E) prefer among classes (C), for tokens' experts (T, K) and classes (T,), -1 for none.

    `lift` (E, C) is the share of the class that chose the expert over the share of all tokens that did; `p` and
    `q` are two-sided; `significant` is the share of (expert, class) pairs with q under 5 %.
    """
    generator = torch.Generator().manual_seed(seed)
    picked = as_mask(chosen, experts).float()
    observed = _counts(picked, classes, len(names))
    size = torch.bincount(classes[classes >= 0], minlength=len(names)).float()
    expected = torch.zeros_like(observed)
    drawn = []
    for _ in range(SHUFFLES):
        drawn.append(_counts(picked, shuffle(classes, generator), len(names)))
        expected += drawn[-1] / SHUFFLES
    far = (observed - expected).abs() - 1e-6
    hits = sum(((d - expected).abs() >= far).float() for d in drawn)
    p = (1 + torch.as_tensor(hits)) / (1 + SHUFFLES)
    q = benjamini_hochberg(p)
    rate = picked.mean(0)[:, None].clamp_min(1e-12)
    lift = observed / size.clamp_min(1) / rate
    return {
        "classes": names,
        "sizes": size.long().tolist(),
        "lift": _rounded(lift),
        "p": _rounded(p),
        "q": _rounded(q),
        "significant": float((q < SIGNIFICANT).float().mean()),
    }


def benjamini_hochberg(p: Tensor) -> Tensor:
    """Adjusted p-values of the same shape: the false discovery rate at which each would be called."""
    flat, order = p.flatten().sort()
    count = len(flat)
    raised = flat * count / torch.arange(1, count + 1)
    smallest = raised.flip(0).cummin(0).values.flip(0).clamp_max(1)
    return torch.empty_like(smallest).scatter_(0, order, smallest).view_as(p)


def over_tokens(classes: Tensor, generator: torch.Generator) -> Tensor:
    """Every token's class to any token."""
    return classes[torch.randperm(len(classes), generator=generator)]


def within(sequences: Tensor) -> Shuffle:
    """Classes move only within their sequence."""

    def shuffle(classes: Tensor, generator: torch.Generator) -> Tensor:
        # Sorted by sequence, then at random: position i of that order gets what position i of the plain one had.
        by_sequence = sequences.argsort(stable=True)
        noise = torch.rand(len(classes), generator=generator)
        mixed = (sequences.double() + noise.double()).argsort()
        out = torch.empty_like(classes)
        out[by_sequence] = classes[mixed]
        return out

    return shuffle


def over_sequences(sequences: Tensor) -> Shuffle:
    """Whole sequences swap their class."""

    def shuffle(classes: Tensor, generator: torch.Generator) -> Tensor:
        count = int(sequences.max()) + 1
        label = torch.full((count,), -1, dtype=classes.dtype)
        label[sequences] = classes
        return label[torch.randperm(count, generator=generator)][sequences]

    return shuffle


def _counts(picked: Tensor, classes: Tensor, count: int) -> Tensor:
    """(E, C): how many tokens of each class chose each expert."""
    some = classes >= 0
    out = torch.zeros(count, picked.shape[1]).index_add_(0, classes[some], picked[some])
    return out.t().contiguous()


def _rounded(t: Tensor) -> list[list[float]]:
    return [[round(v, 4) for v in row] for row in t.tolist()]
