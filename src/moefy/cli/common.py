"""What the commands share: their common options, loading a model by name, text as model inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from moefy.errors import MoefyError

TEXT = (
    "a file (.txt, .txt.gz, .jsonl), hf:DATASET[/CONFIG][:SPLIT], the text itself if it has over 200 characters, or "
    "pydoc, the English text that ships with Python"
)
PYDOC = "pydoc"
Text = Annotated[str | None, typer.Option(help="Text to run; see convert --calibration.", show_default=PYDOC)]
TaskName = Annotated[
    str | None, typer.Option(help="sst2, mnli, mrpc, rte, piqa, arc, race, squad or t2t (text to text).")
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")]
Int8 = Annotated[bool, typer.Option(help="Run the experts with int8 weights (a scale a row and column).")]
RemoteCode = Annotated[bool, typer.Option(help="Run the checkpoint's own code. Only for sources you trust.")]


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Show the progress of a model's loading."""
    from moefy import quiet
    from moefy.cli import console

    with console.progress(f"Loading {name}", counted=False, brief=True) as update, quiet.loading(update):
        yield


def refuse_with_task(options: Mapping[str, object]) -> None:
    """MoefyError if one of these options, None where it was not given, was: a task has no use for it."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        verb, it = ("is", "it") if len(given) == 1 else ("are", "them")
        raise MoefyError(f"{' and '.join(given)} {verb} not for a --task; leave {it} out.")


def load_any(name: str, dtype: str, remote_code: bool, int8: bool = False) -> tuple[Any, Any]:
    """A converted or a dense model, with its tokenizer; shows its progress. With `int8` a converted one's experts are
    packed so."""
    model, tokenizer = _load(name, dtype, remote_code)
    if int8:
        _pack_int8(name, model)
    return model, tokenizer


def _pack_int8(name: str, model: Any) -> None:
    from moefy.cli import console
    from moefy.moe import moe_layers, pack

    if not moe_layers(model):
        raise MoefyError(f"{name} has no experts to make int8; leave out --int8, or convert it first.")
    try:
        with console.status("Packing the experts as int8"):
            pack(model, "int8")
    except MoefyError as error:
        raise MoefyError(f"{error} Leave out --int8.") from None


def load_converted(name: str, dtype: str, remote_code: bool) -> tuple[Any, Any]:
    """A converted model and its tokenizer; MoefyError for any other."""
    from moefy import checkpoint
    from moefy.sources.models import local_path, torch_dtype
    from moefy.sources.tokenizer import load_tokenizer

    with loading(name):
        loaded = checkpoint.load(name, dtype=torch_dtype(dtype))
        return loaded, load_tokenizer(str(local_path(name)), trust_remote_code=remote_code)


def _load(name: str, dtype: str, remote_code: bool) -> tuple[Any, Any]:
    from moefy import checkpoint
    from moefy.hf import MODEL_TYPE
    from moefy.sources.folder import read_config
    from moefy.sources.models import load_source, local_path

    checkpoint.recover(name)
    folder = local_path(name)
    if (folder / "config.json").is_file() and read_config(folder).get("model_type") == MODEL_TYPE:
        return load_converted(name, dtype, remote_code)
    with loading(name):
        return load_source(name, dtype=dtype, remote_code=remote_code)


def text_batches(
    model: Any, tokenizer: Any, text: str, window: int, windows: int, batch_size: int = 1
) -> list[dict[str, Any]]:
    from moefy.calibrate import check_ids, positions, text_calibration

    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise MoefyError(
            f"A {type(model).__name__} takes {model.main_input_name} and no text; feed it such batches from Python, "
            f"with moefy.convert(model, recipe, batches)."
        )
    if tokenizer is None:
        raise MoefyError("This model has no tokenizer, so text cannot be fed to it; use moefy.convert from Python.")
    start = model.config.decoder_start_token_id if model.config.is_encoder_decoder else None
    window = min(window, positions(model) or window)
    size = {"window": window, "windows": windows, "batch_size": batch_size}
    batches = text_calibration(tokenizer, text, decoder_start=start, **size)
    for batch in batches:
        check_ids(model, batch["input_ids"])
    return batches


def number(option: str, text: str | None) -> int | float | None:
    """What an option that takes a count or a share was given: an int where it is written as one, else a float.

    50% is 0.5.
    """
    if text is None:
        return None
    if text.endswith("%"):
        return float(number(option, text[:-1]) or 0) / 100
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise MoefyError(f"{option} takes a share such as 0.5 or a count such as 3, and not {text!r}.")


def gibibytes(option: str, size: float) -> int:
    """The bytes of an option in GiB; MoefyError if it is no size."""
    if not 0 <= size < 1e9:
        raise MoefyError(f"{option} takes GiB, 0 or more, such as 1.5, and not {size}.")
    return int(size * 2**30)
