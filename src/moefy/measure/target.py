"""The smallest budget that keeps a promise: held-out perplexity at most so much above the dense model's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.conversion.budgets import Sensitivity, measure
from moefy.conversion.resume import Store
from moefy.conversion.work import layer_work, measure_work, tokens_in
from moefy.convert import Report, check_dense, convert, planned_shares, planned_specs
from moefy.errors import MoefyError
from moefy.heads import head_of
from moefy.measure.evaluate import perplexity
from moefy.recipe import Recipe
from moefy.sites import Site, find_sites
from moefy.usage import realised_fraction, usage
from moefy.wanted import at_share

# Conversions at most, and how near the smallest budget the search stops.
TRIALS, NEAR = 5, 0.02
# The loss of a routed model over what is predicted without routing, before the first trial has measured it.
FIRST_GUESS = 0.7
LARGEST = 0.95


@dataclass(frozen=True)
class Trial:
    """One conversion: its budget, what ran on the held-out text, and the rise of perplexity there (0.05: 5 %)."""

    budget: float
    realised: float
    rise: float


def smallest_budget(
    model: Any,
    recipe: Recipe,
    batches: Sequence[Mapping[str, Any]],
    held_out: Tensor,
    target: float,
    *,
    prefix: int = 0,
    hold_bytes: int = 1 << 30,
    progress: Callable[[int, int, str], None] | None = None,
    state: Path | None = None,
) -> tuple[Any, Report, list[Trial]]:
    """Convert copies of `model` at budgets that close in on the smallest with a rise of at most `target`.

    `held_out` (N, window) token windows, with `prefix` special tokens each, are not calibrated on. `state` is a folder
    to go on from, see `convert`. Returns the converted copy, its report and every trial; MoefyError if even the
    largest budget does not keep the target.
    """
    recipe, sites = _searchable(model, recipe, target)
    tokens = tokens_in(batches)
    found, total = None, TRIALS * sum(layer_work(site, tokens) for site in sites.values())
    if recipe.allocation == "sensitivity":
        measured = (lambda done, of, name: progress(done, of + total, f"measuring {name}")) if progress else None
        store = Store.of(state, model, batches)
        found = measure(model, sites, batches, hold_bytes, recipe.chunk_tokens, measured, store)
    before = measure_work(sites, batches) if found else 0
    least = _least_budget(sites, recipe, found)
    dense = perplexity(model, held_out, prefix).perplexity
    low, high, scale = 0.0, 1.0, FIRST_GUESS
    best: tuple[Any, Report] | None = None
    trials: list[Trial] = []
    while len(trials) < TRIALS and high - low > NEAR and low < LARGEST and high > least:
        predicted = _predicted_budget(sites, recipe, found, math.log1p(target) / scale) if found else high
        budget = _between(trials, low, high, target) or (predicted if low < predicted < high else (low + high) / 2)
        budget = max(least, min(LARGEST, budget))
        copied, wanted = copy.deepcopy(model), Recipe.of(recipe, budget=budget)
        step = _named(progress, before, len(trials), budget)
        report = convert(copied, wanted, batches, hold_bytes=hold_bytes, progress=step, sensitivity=found, state=state)
        with usage(copied) as counted:
            loss = math.log(perplexity(copied, held_out, prefix).perplexity / dense)
        trials.append(Trial(budget, realised_fraction(copied, counted), math.expm1(loss)))
        if report.predicted_loss is not None:
            scale = max(loss, 1e-4) / max(report.predicted_loss, 1e-9)
        if trials[-1].rise <= target:
            high, best = budget, (copied, report)
        else:
            low = budget
    if best is None:
        raise _none_keeps(target, trials)
    if progress:
        progress(before + total, before + total, "done")  # mostly it takes fewer trials
    return *best, trials


def _searchable(model: Any, recipe: Recipe, target: float) -> tuple[Recipe, dict[str, Site]]:
    """The recipe as the search uses it, and the FFNs; MoefyError if there is nothing to search for."""
    if head_of(model) != "causal":
        raise MoefyError(f"A target loss needs a causal language model, and this is a {type(model).__name__}.")
    check_target(target)
    if not recipe.routes:
        recipe = at_share(recipe, LARGEST)
    if recipe.budget is None:
        raise MoefyError(
            f"A target loss needs a recipe with a budget, such as reconstructed or slim; {recipe.name} has none."
        )
    check_dense(model)
    sites = {site.entry_name: site for site in find_sites(model)}
    recipe = recipe.fitting(site.read().neurons for site in sites.values())
    _fit(sites, Recipe.of(recipe, budget=LARGEST), None)  # what does not fit at all is refused before it is measured
    return recipe, sites


def _none_keeps(target: float, trials: Sequence[Trial]) -> MoefyError:
    nearest = min(trials, key=lambda t: t.rise)
    return MoefyError(
        f"No budget up to {LARGEST} keeps perplexity within {target:.1%} of the dense model's on the held-out text "
        f"(the nearest, {nearest.budget:.2f}, is {nearest.rise:.1%} above); raise the target or calibrate on more text."
    )


def check_target(target: float) -> None:
    """MoefyError if `target` is no rise of perplexity to search for."""
    if not 0 < target < math.inf:
        raise MoefyError(f"A target loss is a rise of perplexity above 0, such as 0.05 for 5 %, and not {target}.")


def _least_budget(sites: Mapping[str, Site], recipe: Recipe, found: Sensitivity | None) -> float:
    """The least budget, to a thousandth, at which every FFN can be cut; MoefyError if LARGEST is too little."""
    _fit(sites, Recipe.of(recipe, budget=LARGEST), found)
    low, high = 0.0, LARGEST
    while high - low > 1e-3:
        middle = (low + high) / 2
        try:
            _fit(sites, Recipe.of(recipe, budget=middle), found)
            high = middle
        except MoefyError:
            low = middle
    return high


def _fit(sites: Mapping[str, Site], recipe: Recipe, found: Sensitivity | None) -> None:
    """MoefyError if `convert` would refuse the recipe's budget."""
    assert recipe.budget is not None
    planned_specs(sites, recipe)
    if found:
        planned_specs(sites, recipe, planned_shares(sites, recipe, found))


def _between(trials: Sequence[Trial], low: float, high: float, target: float) -> float | None:
    """Where the loss between two budgets that were tried crosses the target's, as a line; None if they were not.

    Not nearer to either than half of what the search stops at: a trial a thousandth away would tell nothing.
    """
    rises = {trial.budget: trial.rise for trial in trials}
    if low not in rises or high not in rises:
        return None
    above, goal, below = (math.log1p(rise) for rise in (rises[low], target, rises[high]))
    crossing = low + (high - low) * (above - goal) / (above - below)
    return min(high - NEAR / 2, max(low + NEAR / 2, crossing))


def _predicted_budget(sites: Mapping[str, Site], recipe: Recipe, found: Sensitivity, loss: float) -> float:
    """The budget at which the predicted loss without routing is `loss` nats."""
    low, high = 0.1, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        too_much = found.predicted_loss(planned_shares(sites, Recipe.of(recipe, budget=middle), found)) > loss
        low, high = (middle, high) if too_much else (low, middle)
    return high


def _named(
    progress: Callable[[int, int, str], None] | None, before: int, trial: int, budget: float
) -> Callable[[int, int, str], None] | None:
    """Progress of one trial, `before` which the model was measured, as that of all that there may be."""
    if progress is None:
        return None
    return lambda done, total, name: progress(
        before + trial * total + done, before + TRIALS * total, f"trial {trial + 1}, budget {budget:.2f}"
    )


def split_held_out(batches: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], Tensor]:
    """Calibration batches without every sixth, and the token windows (N, window) of those; MoefyError if too few."""
    if len(batches) < 6:
        raise MoefyError(
            f"A target loss holds every sixth window out, and {len(batches)} are too few; give 6 --windows or more."
        )
    held = torch.cat([batch["input_ids"] for batch in batches[5::6]])
    return [batch for i, batch in enumerate(batches) if i % 6 != 5], held
