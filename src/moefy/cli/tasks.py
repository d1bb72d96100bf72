"""The commands about tasks and about what experts do: relufy, inspect, harness, and eval --task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.common import PYDOC, Dtype, RemoteCode, TaskName, Text, load_any, refuse_with_task, text_batches
from moefy.errors import MoefyError


def relufy(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory or hub name.")],
    output: Annotated[Path, typer.Argument(help="The directory to write: an ordinary checkpoint.")],
    task: Annotated[str, typer.Option(help="The task to fine-tune on; see eval --task.")],
    data: Annotated[list[str], typer.Option(help="The task's training data; see eval --data.")],
    examples: Annotated[int | None, typer.Option(min=1, help="Examples at most, spread over the data.")] = None,
    epochs: Annotated[float, typer.Option(help="How often each is seen.")] = 2.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples in a batch.")] = 32,
    rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-4,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the order of examples and of dropout.")] = 0,
    seconds: Annotated[float | None, typer.Option(help="Stop after so long; repeat the command to go on.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it is a model directory.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Swap a model's activation for ReLU, fine-tune it shortly and save it. A run that was cut off goes on."""
    from moefy.cli import console
    from moefy.tuning.relufy import relufy as relufy_model

    with console.progress("Training") as update:
        trained = relufy_model(
            source,
            output,
            task,
            data,
            examples=examples,
            epochs=epochs,
            batch_size=batch_size,
            rate=rate,
            seed=seed,
            seconds=seconds,
            overwrite=overwrite,
            remote_code=trust_remote_code,
            progress=update,
        )
    loss = "" if trained.loss is None else f", loss {trained.loss:.4f}"
    written = f"{output} is written" if trained.done else "repeat the command to go on"
    console.out.print(f"Step {trained.step} of {trained.steps}{loss}; {written}.")


def inspect(
    model: Annotated[str, typer.Argument(help="A converted directory, or any dense model that convert takes.")],
    output: Annotated[Path, typer.Argument(help="The directory for study.json and study.html.")],
    text: Text = None,
    task: TaskName = None,
    data: Annotated[list[str] | None, typer.Option(help="With --task: its data, whose labels are studied too.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens in a window.")] = 256,
    windows: Annotated[int, typer.Option(min=1, help="Windows at most; with --task, as many tokens.")] = 32,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Study what a model's neurons and experts do: figures as JSON, and one page with plots."""
    from moefy import report, tasks
    from moefy.cli import console
    from moefy.sources import texts
    from moefy.study import study

    if (task is None) != (data is None):
        raise MoefyError("A task is studied on its data; give both --task and --data.")
    if task:
        refuse_with_task({"--text": text})
    report.check(output)
    # What may be wrong with the input is told before a model is loaded.
    examples = tasks.task_examples(task, data) if task and data else []
    body = "" if task else texts.read_text(PYDOC if text is None else text)
    loaded, tokenizer = load_any(model, dtype, trust_remote_code)
    if task:
        found = tasks.example_batches(loaded, tokenizer, task, examples, tokens=window * windows)
    else:
        found = text_batches(loaded, tokenizer, body, window, windows), None, ()
    with console.progress("Studying", counted=False) as update:
        result = study(loaded, tokenizer, *found, progress=update)
    with console.status("Drawing"):
        made = report.write(result, output, f"moefy: {Path(model).name}")
    console.out.print(f"Wrote {made[0]} and {made[1]}.")


def evaluate_task(
    model: str,
    task: str | None,
    data: list[str] | None,
    limit: int | None,
    against: str | None,
    int8: bool,
    dtype: str,
    as_json: bool,
    remote_code: bool,
) -> None:
    from moefy import tasks
    from moefy.cli import console
    from moefy.usage import realised_fraction, usage

    if not task or not data:
        raise MoefyError("A task is measured on its data; give both --task and --data.")
    examples = tasks.task_examples(task, data, limit)
    figures: dict[str, dict[str, float]] = {}
    ours = f"{model} int8" if int8 else model
    for name in (ours, *([against] if against is not None else [])):
        loaded, tokenizer = load_any(model if name == ours else name, dtype, remote_code, int8 and name == ours)
        with console.progress(f"{task}: {name}") as update, usage(loaded) as counted:
            figures[name] = tasks.evaluate_examples(loaded, tokenizer, task, examples, update)
        figures[name]["active_fraction"] = realised_fraction(loaded, counted) if counted else 1.0
    if as_json:
        print(json.dumps({"task": task, "examples": len(examples), "figures": figures}, indent=2))
        return
    rows = [[key.replace("_", " "), *(f"{figures[n][key]:.4f}" for n in figures)] for key in figures[ours]]
    console.table(f"{task}, {len(examples):,} examples", ["", *figures], rows)


def harness(
    model: Annotated[str, typer.Argument(help="A converted directory, or any dense model that convert takes.")],
    tasks: Annotated[list[str], typer.Option("--task", help="A task of lm-evaluation-harness; may be repeated.")],
    include: Annotated[Path | None, typer.Option(help="A folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of a task at most.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Solved examples in the prompt.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples that run at once.")] = 8,
    dtype: Dtype = "auto",
    trust_remote_code: RemoteCode = False,
) -> None:
    """Run lm-evaluation-harness on a model and print its figures as JSON."""
    from moefy.measure.harness import check_installed, run

    check_installed()
    loaded, tokenizer = load_any(model, dtype, trust_remote_code)
    figures = run(loaded, tokenizer, tasks, include=include, limit=limit, shots=shots, batch_size=batch_size)
    print(json.dumps(figures, indent=2))
