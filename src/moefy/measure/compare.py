"""Recipes side by side on one model: several active fractions and seeds, quality and speed, a line of JSON for each.

Every run converts a copy of the dense model. Lines are appended as runs end, so a comparison that was cut off
goes on where it stopped.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefy.conversion.budgets import Sensitivity, measure
from moefy.conversion.resume import digest
from moefy.convert import convert
from moefy.errors import MoefyError, RecipeError
from moefy.files import parse_json
from moefy.heads import head_of
from moefy.hf import versions
from moefy.measure import bench
from moefy.measure.evaluate import perplexity
from moefy.recipe import DEFAULT, RECIPES, Recipe
from moefy.routers import ROUTERS
from moefy.sites import find_sites
from moefy.slim import ordinary
from moefy.usage import realised_fraction, usage
from moefy.wanted import at_share

Progress = Callable[[int, int], None]

#: "NAME:ROUTER" is the recipe NAME with another router, "NAME:control" the same without routing.
DEFAULT_RECIPES = ("cmoe", "moefication", "shared-only", "slim", f"{DEFAULT}:control", DEFAULT, f"{DEFAULT}:oracle")
_HOLD_BYTES = 1 << 30


@dataclass(frozen=True)
class Run:
    """One conversion of a comparison; `active` is the share of FFN multiply-adds that is asked for."""

    recipe: str
    active: float
    seed: int


@dataclass(frozen=True)
class Data:
    """What a comparison runs on, as token windows (N, window) int64.

    `pool` is calibrated on, `take` windows of it, drawn by the seed; `texts` are measured on, by name;
    `prefix` special tokens open each window.
    """

    pool: Tensor
    take: int
    texts: Mapping[str, Tensor]
    prefix: int = 0

    def calibration(self, seed: int) -> list[dict[str, Tensor]]:
        """The seed's windows of the pool, in their order, one a batch."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        rows = self.pool[order[: self.take].sort().values]
        return [{"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]} for ids in rows]


def plan(recipes: Sequence[str], active: Sequence[float], seeds: int) -> list[Run]:
    """The runs of a comparison: all recipes at all fractions with the first seed, then with the next.

    MoefyError if there is no such recipe or router, or a fraction is not above 0 and at most 1.
    """
    for fraction in active:
        if not 0 < fraction <= 1:
            raise MoefyError(
                f"The active fraction {fraction:g} is not a share of the FFNs; give one above 0, at most 1."
            )
    for name in recipes:
        _base(name)
    if not recipes or not active:
        raise MoefyError("There is nothing to compare; give at least one recipe and one active fraction.")
    wanted = [Run(r, a, s) for s in range(seeds) for a in active for r in recipes]
    return list(dict.fromkeys(wanted))


def recipe_at(name: str, active: float, seed: int = 0) -> Recipe:
    """The recipe `name` ("NAME", "NAME:ROUTER", "NAME:control" or a YAML file) at an active fraction."""
    return Recipe.of(at_share(_base(name), active), name=name, seed=seed)


def _base(name: str) -> Recipe:
    base, colon, router = name.rpartition(":")
    if not colon or (name not in RECIPES and Path(name).is_file()):
        return Recipe.of(name)
    return Recipe.of(base).control() if router == "control" else Recipe.of(base, router=router)


@torch.no_grad()
def compare(
    dense: Any,
    runs: Sequence[Run],
    data: Data,
    path: Path,
    *,
    rounds: int = 3,
    model_name: str = "model",
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Do the runs that `path` (JSON lines) does not hold yet; returns the dense model's line and one line a run.

    `rounds` of interleaved timing beside the dense model follow each conversion (0: none). `progress(done,
    total)` counts runs. MoefyError if the model is not a causal language model or `path` holds a comparison
    of something else; a recipe that does not fit the model is a line with a sentence, `skipped`.
    """
    if head_of(dense) != "causal":
        raise MoefyError(f"Recipes are compared by perplexity, and a {type(dense).__name__} has none.")
    if getattr(dense.config, "moefy", None):
        raise MoefyError("This model is converted already; compare recipes on the dense model it came from.")
    path.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(path, settings(dense, data, rounds, model_name))
    base = journal.find({"dense": True}) or journal.append({"dense": True, "perplexity": _perplexities(dense, data)})
    done, measured = [], Measured(dense, data)
    for i, run in enumerate(runs):
        if progress:
            progress(i, len(runs))
        line = _wanted(run)
        done.append(journal.find(line) or journal.append({**line, **_measure(run, measured, base, rounds)}))
    if progress:
        progress(len(runs), len(runs))
    return base, done


class Measured:
    """The dense model, the data, and what converting needs of both, which all runs of a seed share."""

    def __init__(self, dense: Any, data: Data):
        self.dense, self.data = dense, data
        self._key: tuple[int, int] | None = None
        self._found: Sensitivity | None = None

    def sensitivity(self, recipe: Recipe) -> Sensitivity | None:
        """What dividing the recipe's budget over the layers needs; None if it gives all the same share."""
        if recipe.allocation != "sensitivity":
            return None
        key = recipe.seed, recipe.chunk_tokens
        if self._found is None or self._key != key:
            sites = {site.entry_name: site for site in find_sites(self.dense)}
            batches = self.data.calibration(recipe.seed)
            self._key, self._found = key, measure(self.dense, sites, batches, _HOLD_BYTES, recipe.chunk_tokens)
        return self._found


def settings(dense: Any, data: Data, rounds: int, model_name: str) -> dict[str, Any]:
    """What all lines of one comparison have in common; lines of other settings are not mixed with them."""
    return {
        "model": model_name,
        "weights": digest(_samples(dense)),
        "config": dense.config.to_json_string(),
        "calibration": {"pool": list(data.pool.shape), "taken": data.take, "tokens": digest({"pool": data.pool})},
        "texts": {name: {"windows": list(t.shape), "tokens": digest({"text": t})} for name, t in data.texts.items()},
        "prefix": data.prefix,
        "rounds": rounds,
        "versions": versions(),
        "machine": bench.machine(),
    }


# What a run's line holds: for each text, and once.
_OF_TEXTS = ("realised", "perplexity", "ratio")
_OF_RUNS = {"recipe", "active", "seed", "layer_error", "calibration_tokens", "convert_seconds", "speed"}


class Journal:
    """JSON lines in a file: the settings first, then what is done, each line appended whole.

    A last line that was cut off is dropped. MoefyError if the file is not a comparison, or one with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.lines = path, self._read(path)
        if not self.lines:
            self.append({"settings": settings})
            return
        theirs = self.lines[0]["settings"]
        other = [key for key in settings if theirs.get(key) != json.loads(json.dumps(settings[key]))]
        if other:
            raise MoefyError(
                f"{path} holds a comparison with other settings ({other[0]}); choose another directory, or remove it."
            )

    def _read(self, path: Path) -> list[dict[str, Any]]:
        if not path.exists():
            return []
        raw = path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        try:
            lines = [parse_json(line) for line in whole.decode("utf-8").splitlines()]
            if not all(_is_line(line, i and lines[0]["settings"]) for i, line in enumerate(lines)):
                raise ValueError
            if not lines and not b'{"settings": '.startswith(raw[:13]):
                raise ValueError
        except ValueError:
            raise MoefyError(
                f"{path} is not a comparison of moefy's, or is damaged; choose another directory, or remove it."
            ) from None
        if len(whole) < len(raw):
            os.truncate(path, len(whole))
        return lines

    def find(self, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
        """The last line that has all of `wanted`, or None."""
        wanted = json.loads(json.dumps(wanted))
        matches = [line for line in self.lines if all(k in line and line[k] == v for k, v in wanted.items())]
        return matches[-1] if matches else None

    def append(self, line: dict[str, Any]) -> dict[str, Any]:
        """Write a line to the disk; returns it."""
        with self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.append(line)
        return line


def _is_line(line: Any, settings: Any) -> bool:
    """Whether a line of a journal, of these settings, holds what one of ours does; the settings' own is the first."""
    if not isinstance(line, dict) or bool(settings) == ("settings" in line):
        return False
    if not settings:
        return isinstance(line["settings"], dict)
    figures = [line.get(name) for name in (("perplexity",) if "dense" in line else _OF_TEXTS)]
    measured = all(
        isinstance(f, dict)
        and f.keys() == settings.get("texts", {}).keys()
        and all(type(value) in (int, float) for value in f.values())
        for f in figures
    )
    return (measured and ("dense" in line or line.keys() >= _OF_RUNS)) or isinstance(line.get("skipped"), str)


def _wanted(run: Run) -> dict[str, Any]:
    """What identifies a run's line; `fields` are the recipe's, None if there is none at that fraction."""
    line = {"recipe": run.recipe, "active": run.active, "seed": run.seed}
    try:
        return {**line, "fields": recipe_at(run.recipe, run.active, run.seed).model_dump()}
    except MoefyError:
        return {**line, "fields": None}


def _measure(run: Run, measured: Measured, base: dict[str, Any], rounds: int) -> dict[str, Any]:
    dense, data = measured.dense, measured.data
    model = copy.deepcopy(dense)
    try:
        recipe = recipe_at(run.recipe, run.active, run.seed)
        known = measured.sensitivity(recipe)
        report = convert(model, recipe, data.calibration(run.seed), sensitivity=known)
        model = ordinary(model) if recipe.slim else model
        found, realised = _quality(model, data, report.active_fraction)
    except RecipeError as error:
        return {"skipped": str(error)}
    return {
        "realised": realised,
        "perplexity": found,
        "ratio": {name: value / base["perplexity"][name] for name, value in found.items()},
        "layer_error": sum(x.error for x in report.layers) / len(report.layers),
        "calibration_tokens": report.calibration.tokens,
        "convert_seconds": report.seconds,
        "speed": _speed(dense, model, rounds, next(iter(data.texts.values()))) if rounds and _ships(recipe) else None,
    }


def _quality(model: Any, data: Data, nominal: float) -> tuple[dict[str, float], dict[str, float]]:
    """The perplexity on each text, and the share of the FFNs' multiply-adds that ran there."""
    found, realised = {}, {}
    for name, windows in data.texts.items():
        with usage(model) as counted:
            found[name] = perplexity(model, windows, data.prefix).perplexity
        # A threshold runs more experts on one text than on another; without one the share is the recipe's.
        realised[name] = realised_fraction(model, counted) if counted else nominal
    return found, realised


def _ships(recipe: Recipe) -> bool:
    """Whether the recipe's speed says anything: an oracle computes all experts to choose some."""
    return not recipe.routes or ROUTERS[recipe.router].ships


def _speed(dense: Any, model: Any, rounds: int, text: Tensor) -> dict[str, Any]:
    """Decode and the first case of prefill on a text, both models in turns: {case: {"dense" or "model": ...}}."""
    cases = bench.cases(dense, text=text.flatten())
    prefill = [case for case in cases if case.name.startswith("prefill")][:1]
    timed = bench.compare({"dense": dense, "model": model}, rounds, todo=[cases[0], *prefill])
    return {**{name.split()[0]: case for name, case in timed["cases"].items()}, "weight_bytes": timed["weight_bytes"]}


def _perplexities(model: nn.Module, data: Data) -> dict[str, float]:
    return {name: perplexity(model, windows, data.prefix).perplexity for name, windows in data.texts.items()}


def _samples(model: nn.Module) -> dict[str, Tensor]:
    """Some 64 weights of each parameter: enough to tell checkpoints apart without reading them twice."""
    flat = {name: p.detach().flatten() for name, p in model.named_parameters()}
    return {name: p[:: max(1, p.numel() // 64)] for name, p in flat.items()}
