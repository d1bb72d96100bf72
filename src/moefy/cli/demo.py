"""The demo: one real model, converted, saved, reloaded and measured, with nothing to download."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from moefy import checkpoint
from moefy.calibrate import special_prefix, text_calibration, token_windows
from moefy.cli import console
from moefy.convert import Report, convert
from moefy.measure.evaluate import perplexity
from moefy.recipe import Recipe
from moefy.sources import texts
from moefy.sources.models import load_source, smollm2_gguf
from moefy.usage import realised_fraction, usage

NEW_TOKENS = 48


# Calibration windows of 1,024 tokens. With 8 the conversions took 221 and 101 s, with 4 111 to 137 and 60 to 71; the
# model has 1.079x the dense perplexity with 8 and 1.095x with 4, the control 1.181x and 1.202x.
CALIBRATION = 4


def run(output: Path | None, recipe: Recipe, windows: int, overwrite: bool = False) -> None:
    """Convert SmolLM2-135M, save it, reload it, and print it beside the dense model and the control.

    A budget is the same for every layer here: measuring what each needs takes two minutes more.
    """
    recipe = Recipe.of(recipe, allocation="uniform")
    if output is not None:
        checkpoint.check_output(output, overwrite)
    with tempfile.TemporaryDirectory(prefix="moefy-demo-") as scratch:
        _run(recipe, output or Path(scratch) / "converted", windows, overwrite)


def _run(recipe: Recipe, output: Path, windows: int, overwrite: bool) -> None:
    calibrate_on, measure_on = texts.halves(texts.builtin_text())
    with console.status("Loading SmolLM2-135M from its GGUF"):
        model, tokenizer = load_source(smollm2_gguf())
    batches = text_calibration(tokenizer, calibrate_on, windows=CALIBRATION)
    test = token_windows(tokenizer, measure_on, 1024, windows)
    measure = _Measure(test, len(special_prefix(tokenizer)))
    rows = [measure("dense", model)]
    report = _convert(f"Converting ({recipe.name})", model, recipe, batches)
    checkpoint.save(model, output, tokenizer, overwrite=overwrite, source=str(smollm2_gguf()))
    del model
    rows.append(measure("converted", checkpoint.load(output)))
    with console.status("Loading SmolLM2-135M again"):
        model, _ = load_source(smollm2_gguf())
    _convert("Converting the control without routing", model, recipe.control(), batches)
    rows.append(measure("control", model))
    console.table(
        "SmolLM2-135M-Instruct on CPython's documentation",
        ["model", "perplexity", "FFN active", "s (eval)", "prefill tok/s", "decode tok/s"],
        rows,
    )
    console.out.print(
        f"Converted by the recipe {recipe.name} and reloaded from disk; the control shares all that it runs, so that "
        f"nothing is routed. {measure.protocol}. Calibrated on {report.calibration.tokens:,} tokens of the other half. "
        f"Conversion: {report.seconds:.0f} s, peak memory of the process {report.peak_bytes / 2**30:.2f} GiB."
    )


def _convert(what: str, model: Any, recipe: Recipe, batches: list[dict[str, Any]]) -> Report:
    with console.progress(what, counted=False) as update:
        return convert(model, recipe, batches, progress=update)


class _Measure:
    """Perplexity and speed of one model, as a row of the table."""

    def __init__(self, test: torch.Tensor, prefix: int):
        self.test, self.prefix, self.protocol = test, prefix, ""

    def __call__(self, name: str, model: Any) -> list[str]:
        start = time.perf_counter()
        with console.progress(f"Measuring {name}") as update, usage(model) as counted:
            result = perplexity(model, self.test, self.prefix, update)
        seconds = time.perf_counter() - start
        self.protocol = f"Perplexity: {result.protocol()}"
        decode = NEW_TOKENS / _seconds(lambda: _decode(model, self.test[:1, :32]))
        return [
            name,
            f"{result.perplexity:.2f}",
            f"{realised_fraction(model, counted) if counted else 1:.1%}",
            f"{seconds:.1f}",
            f"{self.test.numel() / seconds:.0f}",
            f"{decode:.1f}",
        ]


def _decode(model: Any, ids: torch.Tensor) -> None:
    model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
