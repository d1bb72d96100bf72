"""The convert command: from options to a recipe and calibration inputs, and what it shows at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.common import TEXT, Dtype, RemoteCode, TaskName, gibibytes, loading, number, text_batches
from moefy.errors import MoefyError
from moefy.sources.texts import BUILTIN

# By how much of the FFNs' multiply-adds a conversion may miss what was asked for before it is said.
TOO_MUCH = 0.05
# Free disk, over the model's bytes, that layers are kept for: they, the output, and what an error in each layer costs.
ROOM = 2.5
ROOM_OF_A_SEARCH = 7  # for each of five budgets that are tried

RecipeName = Annotated[
    str | None,
    typer.Option(
        help="reconstructed (the default, and the best), cmoe (the default with --experts, --shared, --construction, "
        "--router or a count for --active), moefication, engine (for moefy export), slim, shared-only, or a YAML file."
    ),
]
Construction = Annotated[
    str | None,
    typer.Option(
        help="How neurons are grouped: activation, weights, coactivation, contribution, random, or shared_only, which "
        "routes nothing."
    ),
]
RouterName = Annotated[
    str | None,
    typer.Option(
        help="How experts are picked: representative, similarity, mlp, linear, logistic, random; oracle and mass look "
        "at the experts' outputs, to measure with."
    ),
]
Active = Annotated[
    str | None,
    typer.Option(
        help="0.5: the share of the FFNs' multiply-adds that runs, by any recipe; by default the recipe's own. 2: so "
        "many routed experts for each token, where the recipe counts them (cmoe, moefication). 1 is one expert there, "
        "elsewhere the whole."
    ),
]
TargetLoss = Annotated[
    str | None,
    typer.Option(help="0.05 or 5%: the smallest budget whose held-out perplexity rises by at most that, instead."),
]
Windows = Annotated[
    int | None,
    typer.Option(min=1, help="Calibration windows at most; by default 48 where a recipe refits, else 16."),
]


def convert(
    source: Annotated[str, typer.Argument(help="A Hugging Face directory or hub name, or a GGUF file.")],
    output: Annotated[Path, typer.Argument(help="The directory to write.")],
    recipe: RecipeName = None,
    experts: Annotated[int | None, typer.Option(help="Experts in all, shared ones included.")] = None,
    expert_size: Annotated[int | None, typer.Option(help="Neurons of an expert, instead of --experts.")] = None,
    shared: Annotated[str | None, typer.Option(help="Experts that always run, or their share such as 0.1.")] = None,
    active: Active = None,
    target_loss: TargetLoss = None,
    construction: Construction = None,
    router: RouterName = None,
    refit: Annotated[bool | None, typer.Option(help="Fit the down-projections to the dense outputs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all that is random.")] = None,
    calibration: Annotated[
        str, typer.Option(help=f"Text to calibrate on: {TEXT}; with --task, that task's data, a file or hf:DATASET.")
    ] = "pydoc",
    task: TaskName = None,
    window: Annotated[int, typer.Option(min=1, help="Tokens in a calibration window.")] = 1024,
    windows: Windows = None,
    memory: Annotated[float, typer.Option(help="GiB of activations to hold between layers; more goes to disk.")] = 1.0,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace the output if it is a model directory.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Convert a dense model's FFNs to mixtures of experts, or slim them, and save the result."""
    from moefy import checkpoint, hf
    from moefy.cli import console
    from moefy.sources.models import load_source
    from moefy.wanted import chosen

    hold = gibibytes("--memory", memory)
    asked, target = number("--active", active), number("--target-loss", target_loss)
    changes = {
        "experts": experts,
        "expert_size": expert_size,
        "shared": number("--shared", shared),
        "active": asked,
        "construction": construction,
        "router": router,
        "refit": refit,
        "seed": seed,
    }
    wanted = chosen(recipe, **{k: v for k, v in changes.items() if v is not None})
    if recipe is None and wanted.name == "cmoe":
        console.err.print("These options mean the recipe cmoe; --recipe reconstructed keeps more of the quality.")
    if windows is None:
        windows = 48 if wanted.refit else 16
    _check_together(task, calibration, target, active)
    out = checkpoint.check_output(output, overwrite, source)
    text = _readable(task, calibration)
    with loading(source):
        model, tokenizer = load_source(source, dtype=dtype, remote_code=trust_remote_code)
    hf.check_named(model)
    batches = _batches(model, tokenizer, task, calibration, text, window, windows)
    with _kept(model, out, target) as state:
        model, report, trials = _converted(model, tokenizer, wanted, batches, target, hold, state)
        with console.status(f"Saving {output}"):
            checkpoint.save(model, output, tokenizer, overwrite=overwrite, source=source)
    _show_conversion(model, output, wanted, report, trials)
    _say_surprises(model, wanted, report, None if trials else asked if isinstance(asked, float) else wanted.budget)


def _check_together(task: str | None, calibration: str, target_loss: float | None, active: str | None) -> None:
    """MoefyError for options that exclude each other, before anything is loaded."""
    from moefy.measure.target import check_target

    if task and calibration == BUILTIN:
        raise MoefyError(f"A conversion for {task} is calibrated on its data; name it with --calibration.")
    if target_loss is None:
        return
    check_target(target_loss)
    if task:
        raise MoefyError("A target loss is a rise of perplexity on text: give --calibration a text, no --task.")
    if active is not None:
        raise MoefyError("--target-loss finds the share that runs; leave out --active, or --target-loss.")


def _readable(task: str | None, calibration: str) -> str:
    """The calibration text, empty for a task's data; MoefyError if it cannot be read, before a model is loaded."""
    from moefy import tasks
    from moefy.sources import texts

    if task is None:
        return texts.read_text(calibration)
    tasks.task_examples(task, calibration, 1)
    return ""


def _batches(
    model: Any, tokenizer: Any, task: str | None, calibration: str, text: str, window: int, windows: int
) -> list[dict[str, Any]]:
    from moefy import tasks

    if task:
        return tasks.task_calibration(model, tokenizer, task, calibration, tokens=window * windows)
    return text_batches(model, tokenizer, text, window, windows)


@contextmanager
def _kept(model: Any, out: Path, target_loss: float | None) -> Iterator[Path | None]:
    """Where layers are kept until the output is written, and its removal then; None if the disk has no room for both.

    What is there already is gone on from. MoefyError if another process is converting to the same output.
    """
    from moefy.cli import console
    from moefy.files import claimed_folder

    state = out.parent / f".{out.name}.converting"
    room = (ROOM if target_loss is None else ROOM_OF_A_SEARCH) * sum(p.nbytes for p in model.parameters())
    there = next(folder for folder in out.parents if folder.exists())
    left = state.exists()
    if not left and shutil.disk_usage(there).free <= room:
        sentence = f"The disk at {there} is too full to keep layers that are done: stopped, this would start anew."
        console.err.print(sentence, soft_wrap=True)
        yield None
        return
    with claimed_folder(state, f"Another process is converting to {out}"):
        if left:
            sentence = f"What an earlier run has left in {state} is used as far as it is of this conversion."
            console.err.print(sentence, soft_wrap=True)
        try:
            yield state
        except (KeyboardInterrupt, MoefyError) as error:
            if any(state.glob("*/*")):
                how = "Repeat" if isinstance(error, KeyboardInterrupt) else "If you know what to change, repeat"
                sentence = f"{how} the command to go on, or remove what is done: {state}."
                console.err.print(sentence, soft_wrap=True)
            raise
        shutil.rmtree(state, ignore_errors=True)


def _converted(
    model: Any,
    tokenizer: Any,
    wanted: Any,
    batches: list[dict[str, Any]],
    target_loss: float | None,
    hold: int,
    state: Path | None,
) -> tuple[Any, Any, list[Any]]:
    """The converted model, its report, and the budgets that were tried for a target."""
    from moefy.calibrate import special_prefix
    from moefy.cli import console
    from moefy.convert import convert as convert_model
    from moefy.measure import target

    with console.progress("Converting layers", counted=False) as shown:

        def update(done: int, of: int, name: str) -> None:
            shown(done, of, label="Measuring layers" if name.startswith("measuring ") else "Converting layers")

        if target_loss is None:
            return model, convert_model(model, wanted, batches, hold_bytes=hold, progress=update, state=state), []
        kept, held_out = target.split_held_out(batches)
        return target.smallest_budget(
            model, wanted, kept, held_out, target_loss,
            prefix=len(special_prefix(tokenizer)), hold_bytes=hold, progress=update, state=state,
        )  # fmt: skip


def _show_conversion(model: Any, output: Path, wanted: Any, report: Any, trials: list[Any]) -> None:
    """The table after `convert`: what was tried for a target, what was made, and what it took."""
    from moefy import slim
    from moefy.cli import console

    before = f", {report.resumed} of them before" if report.resumed else ""
    searched = [
        [f"budget {t.budget:.3f}", f"{t.realised:.1%} ran, perplexity {t.rise:+.1%} on held-out text"] for t in trials
    ]
    rows = [
        ["recipe", report.recipe.name],
        *searched,
        ["layers converted", f"{len(report.layers)}{before}"],
        ["share of FFN multiply-adds active", f"{report.active_fraction:.1%}"],
        *_share_rows(report.layers),
        *_routing_rows(report.layers),
        ["mean error of a layer's output", f"{sum(x.error for x in report.layers) / len(report.layers):.3f}"],
        ["calibration tokens", f"{report.calibration.tokens:,}"],
        ["seconds", f"{report.seconds:.1f}"],
        ["peak memory", f"{report.peak_bytes / 2**30:.2f} GiB"],
    ]
    console.table(f"{output}", ["", ""], rows)
    if wanted.slim:
        note = slim.summary(model.config.moefy)["output_bias"]
        console.out.print(f"{output} is an ordinary model of its architecture. {note}")


def _say_surprises(model: Any, wanted: Any, report: Any, share: float | None) -> None:
    """What nobody asked for, on standard error: experts of another size, more work than wanted or than dense."""
    from moefy.cli import console
    from moefy.moe import moe_layers

    if report.recipe.expert_size != wanted.expert_size:
        console.err.print(
            f"Experts of {wanted.expert_size} neurons do not divide this model's FFNs: they are of "
            f"{report.recipe.expert_size}. Choose another size with --expert-size."
        )
    tokens, width = report.calibration.tokens, min(moe.spec.width for moe in moe_layers(model).values())
    if tokens < width:
        console.err.print(
            f"The calibration has {tokens:,} tokens, fewer than the model is wide ({width:,}): what was made of it is "
            f"as good as chance. Give more text, or more and longer --windows."
        )
    if share is not None and report.active_fraction > share + TOO_MUCH:
        console.err.print(
            f"This model runs {report.active_fraction:.1%} of the FFNs' multiply-adds, and {share:.1%} were asked for: "
            f"its experts are too few to be cut finer, or its router is dear. Use smaller experts (--expert-size), or "
            f"another --router or --recipe."
        )
    elif report.active_fraction > 1:
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
    more = f" and {len(dense) - 8} more" if len(dense) > 8 else ""  # a mixture has thousands of experts
    return shown + ([["layers left dense", ", ".join(dense[:8]) + more]] if dense else [])


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
