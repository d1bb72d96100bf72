"""How much work the steps of a conversion are, so that the time that is left can be told.

The unit is a token through one FFN when its curve is measured. SmolLM2 (1,536 neurons an FFN; two cores of a Zen 4), 6
and 48 windows of 512: one takes 0.12 s an FFN with its gradients, 0.06 in a curve and 0.22 in the conversion.
Besides, a curve takes 0.5 s and a conversion 2.8 whatever the tokens: factors of matrices neurons x neurons, which grow
beside the tokens' part as the neurons do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from moefy.calibrate import spread, tokens_of
from moefy.sites import Site

#: Batches that are measured, evenly spread: for the Fisher information, and for the curves.
METRIC_BATCHES, CURVE_BATCHES = 8, 12
_METRIC, _LAYER = 2, 4  # a token's
_CURVE_MATRICES, _LAYER_MATRICES = 3, 4  # tokens that take as long as what does not depend on them, over the neurons
_TOKEN_VALUES = 768  # of an image or a sound: a patch of 16 x 16 in three colours


def tokens_in(batches: Iterable[Mapping[str, Any]]) -> int:
    """Real tokens; of what is no text about as many as a model makes of it."""
    return sum(tokens_of(batch) or _values(batch) // _TOKEN_VALUES + 1 for batch in batches)


def _values(batch: Mapping[str, Any]) -> int:
    return max((value.numel() for value in batch.values() if isinstance(value, Tensor)), default=0)


def metric_work(sites: Mapping[str, Site], batches: Sequence[Mapping[str, Any]]) -> int:
    """A forward and a backward pass of these batches."""
    return _METRIC * tokens_in(batches) * len(sites)


def curve_work(site: Site, tokens: int) -> int:
    """The curve of one FFN on so many tokens."""
    return tokens + _CURVE_MATRICES * site.read().neurons


def measure_work(sites: Mapping[str, Site], batches: Sequence[Mapping[str, Any]]) -> int:
    """All that a budget's allocation measures first."""
    metric, tokens = metric_work(sites, spread(batches, METRIC_BATCHES)), tokens_in(spread(batches, CURVE_BATCHES))
    return metric + sum(curve_work(site, tokens) for site in sites.values())


def layer_work(site: Site, tokens: int, kept: bool = False) -> int:
    """The conversion of one FFN; of one that is kept from a run before, its share of the forward passes."""
    return tokens if kept else _LAYER * (tokens + _LAYER_MATRICES * site.read().neurons)
