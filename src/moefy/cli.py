"""Turn trained dense transformers into mixtures of experts; measure, time and compare them."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moefy import cli_compare, cli_run, cli_tasks
from moefy.cli_common import Calibration, Dtype, RemoteCode, TaskName, gibibytes, load_any, number, text_batches
from moefy.texts import BUILTIN
from moefy.types import MoefyError
from moefy.version import __version__

# transformers takes seconds to import: `moefy --help` should not wait for it, so commands import inside.

# Help is plain text: read as rich's markup, "hf:DATASET[/CONFIG]" is a tag that nothing opened.
app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help=__doc__,
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


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory or hub name, or a GGUF file.")],
    output: Annotated[Path, typer.Argument(help="The directory to write.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="reconstructed (the default, and the best), cmoe (the default with --experts, --shared, "
            "--construction or --router), moefication, slim, shared-only, or a YAML file."
        ),
    ] = None,
    experts: Annotated[int | None, typer.Option(help="Experts in all, shared ones included.")] = None,
    expert_size: Annotated[int | None, typer.Option(help="Neurons of an expert, instead of --experts.")] = None,
    shared: Annotated[str | None, typer.Option(help="Experts that always run, or their share such as 0.1.")] = None,
    active: Annotated[
        str | None,
        typer.Option(
            help="0.5: the share of the FFNs' multiply-adds that runs, by any recipe (0.75 by default). 2: so many "
            "routed experts for each token, where the recipe counts them. 1 is one expert there, elsewhere the whole."
        ),
    ] = None,
    target_loss: Annotated[
        float | None,
        typer.Option(help="0.05: the smallest budget whose held-out perplexity rises by at most 5 %, instead."),
    ] = None,
    construction: Annotated[str | None, typer.Option(help="How neurons are grouped.")] = None,
    router: Annotated[str | None, typer.Option(help="How experts are picked.")] = None,
    refit: Annotated[
        bool | None, typer.Option(help="Fit the down-projections to the dense outputs afterwards.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random.")] = None,
    calibration: Calibration = "pydoc",
    task: TaskName = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens in a calibration window.")] = 1024,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="Calibration windows at most; by default 48 where a recipe refits, else 16."),
    ] = None,
    memory: Annotated[float, typer.Option(help="GiB of activations to hold between layers; more goes to disk.")] = 1.0,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it is a model directory.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Convert a dense model's FFNs to mixtures of experts, or slim them, and save the result."""
    from moefy import checkpoint, console, slim, target, tasks, texts
    from moefy.calibrate import special_prefix
    from moefy.convert import convert as convert_model
    from moefy.sources import load_source
    from moefy.wanted import chosen

    hold = gibibytes("--memory", memory)
    changes = {
        "experts": experts,
        "expert_size": expert_size,
        "shared": number("--shared", shared),
        "active": number("--active", active),
        "construction": construction,
        "router": router,
        "refit": refit,
        "seed": seed,
    }
    wanted = chosen(recipe, **{k: v for k, v in changes.items() if v is not None})
    if windows is None:
        windows = 48 if wanted.refit else 16
    if task and calibration == BUILTIN:
        raise MoefyError(f"A conversion for {task} is calibrated on its data; name it with --calibration.")
    if target_loss is not None:
        target.check_target(target_loss)
        if task:
            raise MoefyError("A target loss is a rise of perplexity on text: give --calibration a text, no --task.")
        if active is not None:
            raise MoefyError("--target-loss finds the share that runs; leave out --active, or --target-loss.")
    checkpoint.check_output(output, overwrite, source)
    text = None if task else texts.read_text(calibration)
    if task:
        tasks.task_examples(task, calibration, 1)
    with console.status(f"Loading {source}"):
        model, tokenizer = load_source(source, dtype=dtype, remote_code=trust_remote_code)
    if task:
        batches = tasks.task_calibration(model, tokenizer, task, calibration, tokens=window * windows)
    else:
        batches = text_batches(model, tokenizer, text or "", window, windows)
    trials: list[target.Trial] = []
    with console.progress("Converting layers", counted=False) as update:
        if target_loss is None:
            report = convert_model(model, wanted, batches, hold_bytes=hold, progress=update)
        else:
            kept, held_out = target.split_held_out(batches)
            model, report, trials = target.smallest_budget(
                model, wanted, kept, held_out, target_loss,
                prefix=len(special_prefix(tokenizer)), hold_bytes=hold, progress=update,
            )  # fmt: skip
    with console.status(f"Saving {output}"):
        checkpoint.save(model, output, tokenizer, overwrite=overwrite, source=source)
    _show_conversion(output, report, trials)
    _say_surprises(wanted, report)
    if wanted.slim:
        note = slim.summary(model.config.moefy)["output_bias"]
        console.out.print(f"{output} is an ordinary model of its architecture. {note}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A converted directory, or any dense model that convert takes.")],
    text: Annotated[str, typer.Option(help="Text to measure on; see convert --calibration.")] = "pydoc",
    task: TaskName = None,
    data: Annotated[
        list[str] | None, typer.Option(help="The task's data: .tsv, .csv, .jsonl, .json, .txt (.gz) or hf:DATASET.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples at most, spread over the data.")] = None,
    against: Annotated[str | None, typer.Option(help="A dense model to measure beside it.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows at most.")] = 12,
    dtype: Dtype = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure a model: perplexity, agreement with the dense model, routing; or a task's figures."""
    from moefy import console, texts
    from moefy.evaluate import evaluate_model

    if task or data or limit:
        cli_tasks.evaluate_task(model, task, data, limit, against, dtype, as_json, trust_remote_code)
        return
    body = texts.read_text(text)
    with console.status(f"Loading {model}"):
        ours, tokenizer = load_any(model, dtype, trust_remote_code)
        dense = load_any(against, dtype, trust_remote_code)[0] if against else None
    batches = text_batches(ours, tokenizer, body, window, windows)
    with console.progress("Evaluating") as update:
        figures = evaluate_model(ours, dense, batches, tokenizer, update)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    rows = [[name.replace("_", " "), f"{value:.4g}"] for name, value in figures.items() if isinstance(value, float)]
    console.table(model, ["", ""], rows)
    if "protocol" in figures:
        console.out.print(f"Perplexity: {figures['protocol']}.")


app.command()(cli_tasks.relufy)
app.command()(cli_tasks.inspect)
app.command()(cli_tasks.harness)
app.command()(cli_compare.compare)
app.command()(cli_run.generate)
app.command()(cli_run.bench)


@app.command()
def demo(
    output: Annotated[Path | None, typer.Option(help="Keep the converted model here.")] = None,
    recipe: Annotated[str | None, typer.Option(help="A recipe's name or a YAML file.")] = None,
    active: Annotated[
        float | None, typer.Option(help="Share of the FFNs' multiply-adds; by default the recipe's own, 0.75.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 1,024 tokens to measure on.")] = 6,
) -> None:
    """Convert SmolLM2-135M on text that ships with Python, reload it from disk and measure it."""
    from moefy.demo import run
    from moefy.wanted import chosen

    run(output, chosen(recipe, **({} if active is None else {"active": active})), windows)


def _show_conversion(output: Path, report: Any, trials: list[Any]) -> None:
    """The table after `convert`: what was tried for a target, what was made, and what it took."""
    from moefy import console

    searched = [
        [f"budget {t.budget:.3f}", f"{t.realised:.1%} ran, perplexity {t.rise:+.1%} on held-out text"] for t in trials
    ]
    rows = [
        ["recipe", report.recipe.name],
        *searched,
        ["layers converted", str(len(report.layers))],
        ["share of FFN multiply-adds active", f"{report.active_fraction:.1%}"],
        *_share_rows(report.layers),
        *_routing_rows(report.layers),
        ["mean error of a layer's output", f"{sum(x.error for x in report.layers) / len(report.layers):.3f}"],
        ["calibration tokens", f"{report.calibration.tokens:,}"],
        ["seconds", f"{report.seconds:.1f}"],
        ["peak memory", f"{report.peak_bytes / 2**30:.2f} GiB"],
    ]
    console.table(f"{output}", ["", ""], rows)


def _say_surprises(wanted: Any, report: Any) -> None:
    """What nobody asked for, on standard error: experts of another size, and more work than the dense model's."""
    from moefy import console

    if report.recipe.expert_size != wanted.expert_size:
        console.err.print(
            f"Experts of {wanted.expert_size} neurons do not divide this model's FFNs: they are of "
            f"{report.recipe.expert_size}. Choose another size with --expert-size."
        )
    if report.active_fraction > 1:
        console.err.print(
            "This model does more work than the dense one: the routers cost more than they save. Use larger experts "
            "(--expert-size) or another --router."
        )


def _share_rows(layers: list[Any]) -> list[list[str]]:
    """What each layer got of the budget, if not all the same: the least, the most, and those left dense."""
    least, most = (f(layers, key=lambda x: x.active_fraction) for f in (min, max))
    if most.active_fraction - least.active_fraction < 0.02:
        return []
    rows = [["most", most], ["least", least]]
    shown = [[f"{what} active", f"{x.active_fraction:.1%} ({x.name})"] for what, x in rows]
    dense = [x.name for x in layers if x.experts == 0]
    return shown + ([["layers left dense", ", ".join(dense)]] if dense else [])


def _routing_rows(layers: list[Any]) -> list[list[str]]:
    routed = [x for x in layers if x.mass is not None]
    if not routed:
        return []
    mass, overlap = (sum(getattr(x, name) for x in routed) / len(routed) for name in ("mass", "overlap"))
    return [
        ["activation mass in the chosen experts", f"{mass:.1%}"],
        ["chosen experts that are the ground truth's", f"{overlap:.1%}"],
        ["seconds a layer, at most", f"{max(x.seconds for x in layers):.1f}"],
    ]


def main() -> None:
    """The entry point of the `moefy` command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is temporary goes, as on Ctrl-C
    try:
        app(standalone_mode=True)
    except MoefyError as error:
        _fail(str(error))
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # what typer makes of Ctrl-C, without a word
            raise
        print("Interrupted; nothing was left half written.", file=sys.stderr)
        sys.exit(130)
    except MemoryError:
        _fail("There is not enough memory; use a smaller --window, fewer --windows or a smaller --memory.")
    except OSError as error:
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.")
    except Exception as error:
        if os.environ.get("MOEFY_TRACEBACK"):
            raise
        what = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        print(
            f"moefy: This went wrong in a way that moefy does not know ({what}); repeat it with MOEFY_TRACEBACK=1 "
            f"to see where, and report that.",
            file=sys.stderr,
        )
        sys.exit(1)


def _fail(sentence: str) -> None:
    print(f"moefy: {sentence}", file=sys.stderr)
    sys.exit(2)
