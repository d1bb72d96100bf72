"""Turn trained dense transformers into mixtures of experts; measure, time and compare them."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

import moefy
from moefy.cli import compare, convert, export, run, tasks, tune
from moefy.cli.common import (
    PYDOC,
    Dtype,
    Int8,
    RemoteCode,
    TaskName,
    load_any,
    number,
    refuse_with_task,
    text_batches,
)
from moefy.errors import MoefyError, MoefyWarning
from moefy.version import __version__
from moefy_cli import starting, stops

# Help is plain text: read as rich's markup, "hf:DATASET[/CONFIG]" is a tag that nothing opened.
app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__,
)

NO_MEMORY = (
    "There is not enough memory for that; use a smaller model, fewer or smaller windows, smaller batches, a smaller "
    "--rank or --memory, or for wide FFNs --recipe cmoe."
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moefy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def whole(command: Callable[..., None]) -> Callable[..., None]:
    """The command with all of moefy imported before it runs: `moefy --help` does not wait for torch and transformers.

    For the same reason the commands import inside.
    """

    @wraps(command)
    def run(*args: Any, **options: Any) -> None:
        if not moefy._is_whole:
            from moefy.cli import console

            starting.now = False
            with console.err.status("Starting"):  # in a log that is no news
                importlib.reload(moefy)
        stops.raise_on_stop()  # from here on what is temporary has to go
        from moefy import kernels

        kernels.check()
        warnings.showwarning = _show_warning
        command(*args, **options)

    return run


app.command()(whole(convert.convert))


@app.command("eval")
@whole
def evaluate(
    model: Annotated[str, typer.Argument(help="A converted directory, or any dense model that convert takes.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="Text to measure on, not that of the calibration; see convert --calibration.",
            show_default="the second half of pydoc",
        ),
    ] = None,
    task: TaskName = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="The task's data: .tsv, .csv, .jsonl, .json, .txt (.gz) or hf:DATASET; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --task: examples at most, over all the data.")] = None,
    against: Annotated[str | None, typer.Option(help="A dense model to measure beside it.")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Tokens in a window.", show_default="1024")] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows at most.", show_default="12")] = None,
    int8: Int8 = False,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure a model: perplexity, agreement with the dense model, routing; or a task's figures."""
    from moefy.cli import console
    from moefy.measure.evaluate import evaluate_model
    from moefy.sources import texts

    if task or data or limit:
        if task:
            refuse_with_task({"--text": text, "--window": window, "--windows": windows})
        tasks.evaluate_task(model, task, data, limit, against, int8, dtype, as_json, trust_remote_code)
        return
    # By default what `convert` is not calibrated on by default: its 48 windows are of the first half.
    body = texts.halves(texts.builtin_text())[1] if text in (None, PYDOC) else texts.read_text(text)
    ours, tokenizer = load_any(model, dtype, trust_remote_code, int8)
    dense = load_any(against, dtype, trust_remote_code)[0] if against is not None else None
    batches = text_batches(ours, tokenizer, body, window or 1024, windows or 12)
    with console.progress("Evaluating") as update:
        figures = evaluate_model(ours, dense, batches, tokenizer, update)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    rows = [[name.replace("_", " "), f"{value:.4g}"] for name, value in figures.items() if isinstance(value, float)]
    console.table(f"{model} int8" if int8 else model, ["", ""], rows)
    if "protocol" in figures:
        console.out.print(f"Perplexity: {figures['protocol']}.")
    elif against is None:
        kind = type(ours).__name__
        console.out.print(f"A {kind} has no perplexity: for its quality give --against a dense model, or a --task.")


app.command()(whole(tune.tune))
app.command()(whole(tasks.relufy))
app.command()(whole(tasks.inspect))
app.command()(whole(tasks.harness))
app.command()(whole(compare.compare))
app.command()(whole(run.generate))
app.command()(whole(run.bench))
app.command()(whole(export.export))


@app.command()
@whole
def demo(
    output: Annotated[Path | None, typer.Option(help="Keep the converted model here.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or a YAML file.")] = None,
    active: Annotated[
        str | None, typer.Option(help="Share of the FFNs' multiply-adds; by default the recipe's own, 0.75.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 1,024 tokens to measure on.")] = 6,
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it is a model directory.")] = False,
) -> None:
    """Convert SmolLM2-135M on text that ships with Python, reload it from disk and measure it."""
    from moefy.cli.demo import run
    from moefy.wanted import chosen

    share = number("--active", active)
    run(output, chosen(recipe, **({} if share is None else {"active": float(share)})), windows, overwrite)


def main() -> None:
    """Run the command that sys.argv names; moefy_cli.main is the entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may not know a dash, or a file's name be no text
    try:
        app(standalone_mode=True)
    except MoefyError as error:
        _fail(str(error))
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # what typer makes of Ctrl-C, without a word
            raise
        print(stops.INTERRUPTED, file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        _fail(NO_MEMORY)
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
    except Exception as error:
        if "DefaultCPUAllocator" in str(error):  # torch's for what no memory is there for
            _fail(NO_MEMORY)
        if os.environ.get("MOEFY_TRACEBACK"):
            raise
        what = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        print(
            f"moefy: This went wrong in a way that moefy does not know ({what}); repeat it with MOEFY_TRACEBACK=1 "
            f"to see where, and report that.",
            file=sys.stderr,
        )
        sys.exit(1)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Ours are a line; where in the source they arose does not matter to whoever runs a command."""
    if issubclass(category, MoefyWarning):
        print(message, file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr, end="")


def _fail(sentence: str) -> None:
    print(f"moefy: {sentence}", file=sys.stderr)
    sys.exit(2)
