"""Which tokens each expert prefers, and whether that is more than chance: permutation tests.

The statistic of an expert and a class of tokens is how many of the class chose the expert. Its distribution
under chance comes from moving the classes, in one of three ways:

- over all tokens: tokens are taken to choose independently of each other. The count is then
  hypergeometric, and its tail is exact;
- by turning each sequence round (`turned`): parts of a sequence, whose neighbouring tokens choose alike;
- over whole sequences (`over_sequences`): labels.

The last two are drawn SHUFFLES times. What the draws do not resolve is read off a gamma distribution with
their mean, deviation and skewness. Benjamini-Hochberg's q is over all experts and classes of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from moefy.stats import as_mask

SHUFFLES = 800
SIGNIFICANT = 0.05
# Draws as far out as the observed count: with fewer, the tail's shape says more than their number.
RESOLVED = 10

Shuffle = Callable[[Tensor, torch.Generator], Tensor]


def preferences(
    chosen: Tensor, classes: Tensor, names: list[str], shuffle: Shuffle | None, experts: int, seed: int = 0
) -> dict[str, Any]:
    """What experts (E) prefer among classes (C), for tokens' experts (T, K) and classes (T,), -1 for none.

    `shuffle` moves the classes, None over all tokens. `lift` (E, C) is the share of the class that chose the expert
    over the share of all tokens that did; `p` and `q` are two-sided; `significant` is the share of
    (expert, class) pairs with q under 5 %.
    """
    picked = as_mask(chosen, experts).float()
    observed = _counts(picked, classes, len(names))
    size = torch.bincount(classes[classes >= 0], minlength=len(names))
    if shuffle is None:
        p = independent_tokens(observed, picked.sum(0), size, len(picked))
    else:
        generator = torch.Generator().manual_seed(seed)
        p = beyond((_counts(picked, shuffle(classes, generator), len(names)) for _ in range(SHUFFLES)), observed)
    q = torch.from_numpy(stats.false_discovery_control(p.numpy(), axis=None)).view_as(p)
    rate = picked.mean(0)[:, None].clamp_min(1e-12)
    lift = observed / size.clamp_min(1) / rate
    return {
        "classes": names,
        "sizes": size.tolist(),
        "lift": [[round(v, 4) for v in row] for row in lift.tolist()],
        "p": _three_digits(p),
        "q": _three_digits(q),
        "significant": float((q < SIGNIFICANT).double().mean()),
    }


def independent_tokens(observed: Tensor, picked: Tensor, size: Tensor, tokens: int) -> Tensor:
    """The share (E, C) of all placings of the classes on the tokens whose count is as far out, on either side.

    `observed` (E, C) are the counts, `picked` (E,) the tokens of each expert and `size` (C,) of each class.
    """
    count, chosen, of_class = (t.long().numpy() for t in (observed, picked[:, None], size[None]))
    at_most = stats.hypergeom.cdf(count, tokens, chosen, of_class)
    # At least so many that chose the expert: at most so many that did not. scipy's sf is a loop in Python.
    at_least = stats.hypergeom.cdf(of_class - count, tokens, tokens - chosen, of_class)
    return _two_sided(torch.from_numpy(np.minimum(at_most, at_least)))


def beyond(draws: Iterable[Tensor], observed: Tensor) -> Tensor:
    """How likely a draw is as far out as `observed`, on either side, element by element, in float64."""
    drawn = torch.stack(list(draws)).double()
    hits = torch.minimum((drawn >= observed).sum(0), (drawn <= observed).sum(0)).double()
    mean = drawn.mean(0)
    off = drawn - mean
    deviation = off.square().mean(0).sqrt().clamp_min(1e-12)
    skewness = (off**3).mean(0) / deviation**3 * (observed - mean).sign()
    # At least what the draws have seen: a count of few tokens has a rougher tail than any formula.
    # On the short side it is taken as normal, which is more than it is.
    tail = torch.from_numpy(stats.pearson3.sf(((observed - mean).abs() / deviation).numpy(), skewness.clamp_min(0)))
    tail = tail.maximum(hits / (1 + len(drawn)))
    return _two_sided(torch.where(hits < RESOLVED, tail, (1 + hits) / (1 + len(drawn))))


def _two_sided(p: Tensor) -> Tensor:
    """From the smaller of the two tails."""
    return (2 * p).clamp_max(1)


def turned(sequences: Tensor) -> Shuffle:
    """Each sequence's classes turned round within it, by any number of tokens: all but its ends stay neighbours.

    `sequences` (T,) numbers the tokens' sequences from 0, each in one piece.
    """
    lengths = sequences.bincount()
    starts = lengths.cumsum(0) - lengths
    length, start = lengths[sequences], starts[sequences]
    place = torch.arange(len(sequences)) - start

    def shuffle(classes: Tensor, generator: torch.Generator) -> Tensor:
        shift = (torch.rand(len(lengths), generator=generator, dtype=torch.float64) * lengths).long()
        return classes[start + (place + shift[sequences]) % length]

    return shuffle


def over_sequences(sequences: Tensor) -> Shuffle:
    """Whole sequences swap their class, those that `sequences` (T,) names."""
    # An expert of a mixture sees some only, and the others have no class to swap.
    sequences = sequences.unique(return_inverse=True)[1]
    count = int(sequences.max()) + 1

    def shuffle(classes: Tensor, generator: torch.Generator) -> Tensor:
        label = torch.full((count,), -1, dtype=classes.dtype)
        label[sequences] = classes
        return label[torch.randperm(count, generator=generator)][sequences]

    return shuffle


def _counts(picked: Tensor, classes: Tensor, count: int) -> Tensor:
    """(E, C): how many tokens of each class chose each expert."""
    some = classes >= 0
    out = torch.zeros(count, picked.shape[1]).index_add_(0, classes[some], picked[some])
    return out.t().contiguous()


def _three_digits(t: Tensor) -> list[list[float]]:
    return [[float(f"{v:.3g}") for v in row] for row in t.tolist()]
