"""The smallest budget that keeps a promise, and what a user's words mean."""

import copy
import math

import pytest
import torch

import moefy
import tiny
from moefy.measure import target
from moefy.measure.evaluate import perplexity
from moefy.measure.target import LARGEST, TRIALS, smallest_budget, split_held_out
from moefy.recipe import DEFAULT, Recipe


def trained(seed=0):
    """A tiny model with something to lose: it has learnt to count."""
    model = tiny.tiny("llama", seed)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        ids = counting(16)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


def counting(rows, length=24):
    return (torch.randint(3, 90, (rows, 1)) + torch.arange(length) * torch.randint(1, 4, (rows, 1))) % 87 + 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return trained()


def batches(count=12):
    return [{"input_ids": ids} for ids in counting(4 * count).split(4)]


def test_the_target_is_kept_and_less_would_not_be_found_to_keep_it(model):
    kept, held_out = split_held_out(batches(24))
    recipe = Recipe.of(DEFAULT, expert_size=2)
    seen = []
    converted, report, trials = smallest_budget(
        model, recipe, kept, held_out, 0.1, progress=lambda done, total, name: seen.append((done, total))
    )
    assert len({total for _, total in seen}) == 1
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
    assert not getattr(model.config, "moefy", None)
    rise = perplexity(converted, held_out).perplexity / perplexity(model, held_out).perplexity - 1
    best = min((t for t in trials if t.rise <= 0.1), key=lambda t: t.budget)
    assert rise == pytest.approx(best.rise, abs=1e-4)
    assert report.recipe.budget == best.budget
    assert all(t.rise > 0.1 for t in trials if t.budget < best.budget)
    assert 1 <= len(trials) <= TRIALS


@pytest.mark.parametrize(
    ("recipe", "size", "trials"), [("reconstructed", 8, 1), ("slim", 1, TRIALS), ("shared-only", 2, 5)]
)
def test_a_target_that_every_budget_keeps_gives_the_least_that_can_be_cut(model, recipe, size, trials):
    kept, held_out = split_held_out(batches())
    recipe = Recipe.of(recipe, expert_size=size)
    _, report, tried = smallest_budget(model, recipe, kept, held_out, 1e6)
    assert report.recipe.allocation == recipe.allocation
    assert report.recipe.budget == tried[-1].budget == min(t.budget for t in tried)
    assert len(tried) == trials
    if trials < TRIALS:
        with pytest.raises(moefy.MoefyError, match="less than one of 6 experts"):
            moefy.convert(copy.deepcopy(model), Recipe.of(recipe, budget=tried[-1].budget - 2e-3), kept)


def test_a_recipe_that_fits_at_no_budget_is_refused_before_anything_is_measured(model, monkeypatch):
    monkeypatch.setattr(target, "measure", None)
    with pytest.raises(moefy.MoefyError, match="7 neurons an expert do not divide"):
        smallest_budget(model, Recipe.of(DEFAULT, expert_size=7), batches(), counting(2), 0.1)


def test_a_target_that_no_budget_keeps_is_a_sentence(model):
    kept, held_out = split_held_out(batches())
    with pytest.raises(moefy.MoefyError, match="keeps perplexity within"):
        smallest_budget(model, Recipe.of(DEFAULT, expert_size=2), kept, held_out, 1e-9)
    assert LARGEST < 1


def test_held_out_windows_are_not_calibrated_on():
    made = batches()
    kept, held_out = split_held_out(made)
    assert len(kept) == 10
    assert torch.equal(held_out, torch.cat([made[5]["input_ids"], made[11]["input_ids"]]))
    with pytest.raises(moefy.MoefyError, match="too few"):
        split_held_out(made[:5])


@pytest.mark.parametrize("rise", [0, -0.1, math.nan, math.inf])
def test_a_target_of_nothing_is_refused(model, rise):
    with pytest.raises(moefy.MoefyError, match="above 0"):
        smallest_budget(model, Recipe.of(DEFAULT), batches(), counting(2), rise)


def test_a_recipe_without_a_budget_and_a_converted_model_are_refused(model):
    with pytest.raises(moefy.MoefyError, match="recipe with a budget"):
        smallest_budget(model, Recipe.of("cmoe"), batches(), counting(2), 0.1)
    converted = tiny.tiny("llama")
    moefy.convert(converted, Recipe(experts=8, shared=2, active=2), batches())
    with pytest.raises(moefy.MoefyError, match="converted already"):
        smallest_budget(converted, Recipe.of(DEFAULT), batches(), counting(2), 0.1)


def test_a_model_without_perplexity_is_refused():
    with pytest.raises(moefy.MoefyError, match="causal language model"):
        smallest_budget(tiny.tiny("bert"), Recipe.of(DEFAULT), batches(), counting(2), 0.1)


def test_the_search_goes_on_where_the_loss_between_two_trials_crosses_the_target():
    trials = [target.Trial(0.5, 0.5, 0.20), target.Trial(0.9, 0.9, 0.02)]
    crossing = target._between(trials, 0.5, 0.9, 0.05)
    assert 0.8 < crossing < 0.85
    assert target._between(trials, 0.5, 0.9, 0.0201) == 0.9 - target.NEAR / 2
    assert target._between(trials, 0.5, 0.9, 0.1999) == 0.5 + target.NEAR / 2
    assert target._between(trials, 0.0, 0.9, 0.05) is None
