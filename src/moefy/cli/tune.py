"""The tune command: light fine-tuning of a converted model, from options to a new checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.common import TEXT, Dtype, RemoteCode, load_any, load_converted, text_batches


def tune(
    model: Annotated[str, typer.Argument(help="A converted directory.")],
    output: Annotated[Path, typer.Argument(help="The directory to write.")],
    text: Annotated[str, typer.Option(help=f"Text to train on: {TEXT}.")] = "pydoc",
    teacher: Annotated[
        str | None,
        typer.Option(help="The dense model, whose predictions are learned instead of the text: better on other text."),
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Windows of text at most; up to one in ten is held out.")] = 2048,
    window: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a step.")] = 4,
    epochs: Annotated[int, typer.Option(min=1, help="How often each window is seen.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Rank of the adapters; 0 trains the gate scale alone.")] = 8,
    rate: Annotated[float | None, typer.Option(help="The adapters' highest learning rate; by default 2e-3.")] = None,
    attention: Annotated[bool, typer.Option(help="Adapters outside the FFNs too.")] = True,
    gate_scale: Annotated[bool, typer.Option("--gate-scale", help="Train a weight for each expert (CMoE).")] = False,
    balance: Annotated[
        float,
        typer.Option(help="Step of a bias that evens out the experts' use, in standard deviations of their scores."),
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the order of windows and of the adapters.")] = 0,
    seconds: Annotated[float | None, typer.Option(help="Stop after so long; repeat the command to go on.")] = None,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it is a model directory.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fine-tune a converted model shortly, on text or to its dense model. A run that was cut off goes on."""
    from moefy import checkpoint
    from moefy.cli import console
    from moefy.measure.evaluate import check_comparable
    from moefy.sources import texts
    from moefy.tuning.adapters import check_peft
    from moefy.tuning.finetune import check_positive
    from moefy.tuning.tune import RATE, TuneOptions
    from moefy.tuning.tune import tune as tune_model

    options = {"rank": rank, "rate": RATE if rate is None else rate, "attention": attention, "gate_scale": gate_scale}
    options |= {"balance": balance, "epochs": epochs, "seed": seed}
    TuneOptions(**options)  # type: ignore[arg-type]
    check_positive({"The number of seconds": seconds})
    if rank and attention:
        check_peft()
    for source in (model, teacher or model):
        out = checkpoint.check_output(output, overwrite, source)
    body = texts.read_text(text)
    loaded, tokenizer = load_converted(model, dtype, trust_remote_code)
    dense = load_any(teacher, dtype, trust_remote_code)[0] if teacher is not None else None
    if dense is not None:
        check_comparable(loaded, dense)
    batches = text_batches(loaded, tokenizer, body, window, samples, batch_size)
    state = out.parent / f".{out.name}.tuning.safetensors"
    with console.progress("Tuning") as update:
        tuned = tune_model(loaded, batches, teacher=dense, state=state, seconds=seconds, progress=update, **options)
    if not tuned.done:
        console.out.print(f"Step {tuned.step} of {tuned.steps}; repeat the command to go on.")
        return
    with console.status(f"Saving {output}"):
        checkpoint.save(loaded, output, tokenizer, overwrite=overwrite, source=model)
    state.unlink(missing_ok=True)
    _show(output, tuned)


def _show(output: Path, tuned: Any) -> None:
    from moefy.cli import console

    rows = [
        ["steps", str(tuned.steps)],
        ["tokens", f"{tuned.tokens:,}"],
        ["numbers trained", f"{tuned.trained:,}"],
        [f"{tuned.loss} before, held-out text", f"{tuned.loss_before:.4f}"],
        ["after", f"{tuned.loss_after:.4f}"],
        ["seconds", f"{tuned.seconds:.1f}"],
    ]
    console.table(f"{output}", ["", ""], rows)
    if tuned.loss_after > tuned.loss_before:
        console.err.print("The loss has risen: train on more --samples, or at a lower --rate; the source is as it was.")
