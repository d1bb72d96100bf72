"""The command that compares recipes on a model: compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moefy.cli.common import TEXT, Dtype, RemoteCode, load_any, number, text_batches
from moefy.errors import MoefyError

if TYPE_CHECKING:
    from moefy.measure.compare import Data

# Windows to draw each seed's calibration from, in multiples of what a seed takes.
POOL = 8


def compare(
    source: Annotated[str, typer.Argument(help="A dense model: a directory, a hub name or a GGUF file.")],
    output: Annotated[Path, typer.Argument(help="The directory for compare.jsonl and compare.html.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to measure on, by default --calibration's; repeat for more. One that is also --calibration "
            "is cut in halves."
        ),
    ] = None,
    calibration: Annotated[str, typer.Option(help=f"Text to calibrate on: {TEXT}.")] = "pydoc",
    recipes: Annotated[
        str | None,
        typer.Option(
            help="Recipes or YAML files, with commas; NAME:ROUTER for another router, NAME:control for none. By "
            "default all but engine, and reconstructed as :control and :oracle too."
        ),
    ] = None,
    active: Annotated[str, typer.Option(help="Shares of the FFNs' multiply-adds, with commas.")] = "0.75,0.5,0.25",
    seeds: Annotated[int, typer.Option(min=1, help="Conversions of each kind.")] = 3,
    windows: Annotated[int, typer.Option(min=1, help="Windows of each text to measure on, at most.")] = 12,
    calibration_windows: Annotated[
        int, typer.Option(min=1, help="Windows that a seed is calibrated on (convert takes 48 where a recipe refits).")
    ] = 16,
    window: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 1024,
    rounds: Annotated[int, typer.Option(min=0, help="Rounds of timing beside the dense model; 0: no timing.")] = 3,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Convert a model by several recipes, fractions and seeds; quality and speed as a table and one page.

    A comparison that was cut off goes on when the command is repeated.
    """
    from moefy.cli import console
    from moefy.measure import compare as comparison
    from moefy.report import compare_page, plots

    plots.check()
    names = _listed(recipes) if recipes is not None else list(comparison.DEFAULT_RECIPES)
    runs = comparison.plan(names, _fractions(active), seeds)
    bodies = _bodies(calibration, text)
    if output.exists() and not output.is_dir():
        raise MoefyError(f"{output} is not a directory; choose another output.")
    dense, tokenizer = load_any(source, dtype, trust_remote_code)
    data = _data(dense, tokenizer, bodies, window, windows, calibration_windows)
    lines, name = output / "compare.jsonl", Path(source).name
    try:
        with console.progress("Comparing recipes") as update:
            base, done = comparison.compare(dense, runs, data, lines, rounds=rounds, model_name=name, progress=update)
    except KeyboardInterrupt:
        console.err.print(f"What is done is in {lines}; repeat the command to go on.")
        raise
    used = comparison.settings(dense, data, rounds, name)
    made = compare_page.write(used, base, done, output / "compare.html")
    print(compare_page.markdown(base, done))
    left_out = [f"{x['recipe']} at {x['active']:.0%} is left out: {x['skipped']}" for x in done if "skipped" in x]
    for sentence in dict.fromkeys(left_out):  # a seed changes nothing of it
        console.err.print(sentence)
    console.out.print(f"Wrote {lines} and {made}.")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _fractions(text: str) -> list[float]:
    try:
        return [float(number("--active", part) or 0) for part in _listed(text)]
    except MoefyError:
        raise MoefyError(f"--active takes numbers with commas, such as 0.75,0.5, and not {text!r}.") from None


def _bodies(calibration: str, texts: Sequence[str] | None) -> tuple[str, dict[str, str]]:
    """The text to calibrate on, and those to measure on by a short name: never the same words."""
    from moefy.sources.texts import halves, read_text

    whole = read_text(calibration)
    first, second = halves(whole)
    bodies: dict[str, str] = {}
    for source in dict.fromkeys(texts or [calibration]):
        name = source if len(source) <= 200 else f"{' '.join(source.split())[:40]}…"
        short = Path(source).name if name == source else name
        name = (short if short not in bodies else name).encode(errors="backslashreplace").decode()
        text = whole if source == calibration else read_text(source)
        bodies[name] = second if text == whole else text  # by its words: a file has many paths
    return first if second in bodies.values() else whole, bodies


def _data(
    model: Any, tokenizer: Any, bodies: tuple[str, dict[str, str]], window: int, windows: int, taken: int
) -> Data:
    import torch

    from moefy.calibrate import special_prefix
    from moefy.measure.compare import Data

    def rows(text: str, count: int) -> torch.Tensor:
        return torch.cat([batch["input_ids"] for batch in text_batches(model, tokenizer, text, window, count)])

    pool = rows(bodies[0], POOL * taken)
    measured = {name: rows(text, windows) for name, text in bodies[1].items()}
    return Data(pool, taken, measured, len(special_prefix(tokenizer)))
