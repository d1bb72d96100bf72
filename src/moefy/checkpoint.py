"""Save and load converted models: safetensors, written beside and renamed into place."""

from __future__ import annotations

import copy
import errno
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedModel

from moefy import hf, slim
from moefy.convert import check_no_adapters
from moefy.errors import MoefyError
from moefy.files import parse_json, put_in_place, sync
from moefy.model_card import model_card
from moefy.older import say_for_older
from moefy.quiet import quiet_transformers
from moefy.recipe import Recipe
from moefy.sites import bamboo, find_sites
from moefy.sources import hub
from moefy.sources.folder import check_directory
from moefy.sources.models import (
    LOAD_ERRORS,
    check_complete,
    check_weights,
    local_path,
    reason,
    weights_of,
)

# Files of the source that a converted model needs as they are.
_COMPANIONS = (
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def check_output(
    path: str | os.PathLike[str],
    overwrite: bool = False,
    source: str | os.PathLike[str] | None = None,
    kind: str = "model directory",
    is_one: Callable[[Path], bool] | None = None,
) -> Path:
    """The model directory, or another `kind`, to write, links followed. Nothing is left there by the check.

    Raises MoefyError if something that may not be replaced is there (an empty folder may), if it is or holds the
    current directory or `source` (a path; other names are not looked at), or if it cannot be written.
    """
    out = _place(path)
    try:
        _recover(out)
        if source is not None:
            recover(source)
        if source is not None and (origin := _place(source)).exists() and out in (origin, *origin.parents):
            what = "is" if out == origin else "holds"
            raise MoefyError(f"{path} {what} the source {source}, which would be lost; choose another output.")
        if out.is_mount():
            raise MoefyError(f"{path} is a mount point, which nothing can be renamed to; name a folder in it.")
        if out.is_dir() and Path.cwd().is_relative_to(out):  # it would be renamed away under the shell's feet
            raise MoefyError(f"{path} is the current directory, or holds it; name another one, such as a folder in it.")
        if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
            raise MoefyError(f"{path} exists already; choose another output or say --overwrite (overwrite=True).")
        if out.exists() and not (is_one or is_model_directory)(out):
            raise MoefyError(f"{path} is not a {kind}, so it will not be overwritten.")
        if out.is_dir() and overwrite and is_model_directory(_old(out)):  # of an overwrite that was cut off
            shutil.rmtree(_old(out), ignore_errors=True)
        if out.is_dir() and _old(out).exists():  # where it would be put while the new one takes its place
            raise MoefyError(
                f"{_old(out)} is in the way, and moefy has not made it; move it, or choose another output."
            )
        _probe(out)
    except OSError as error:
        raise MoefyError(why_not_written(error, out)) from None
    return out


def is_model_directory(out: Path) -> bool:
    """Whether a folder is empty or a model's: other programs have a config.json too."""
    try:
        config = parse_json((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    named = isinstance(config, dict) and ("model_type" in config or "architectures" in config)
    return out.is_dir() and (named or not any(out.iterdir()))


def save(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    source: str | None = None,
    figures: dict[str, float] | None = None,
) -> Path:
    """Write a converted model: shards, config, recipe.yaml, report.json, a model card, the tokenizer.

    With the recipe `slim` it is an ordinary checkpoint of the source's architecture with narrower FFNs.
    `source` names the dense model in the card, `figures` are measured numbers to print there. Everything
    is written to a hidden directory beside `path` and renamed, so a crash leaves nothing or the whole.
    Raises MoefyError if the output exists (unless `overwrite`), the disk is full or it is not writable.
    """
    check_no_adapters(model)
    if not isinstance(model, PreTrainedModel):
        raise MoefyError(f"This {type(model).__name__} is no model of transformers; give the model that it wraps.")
    record = getattr(model.config, "moefy", None)
    if not record:
        raise MoefyError("This model is not converted, so there is nothing for moefy to save; convert it first.")
    hf.check_named(model)
    check_weights(model)
    out = check_output(path, overwrite, source)
    with written(out) as folder:
        _write(model, folder, tokenizer, source, figures, record)
    return out


@contextmanager
def written(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes its place, whole, at the end of a with block; after an error it is gone.

    Raises MoefyError if the disk is full or the folder cannot be written.
    """
    with _beside(out) as partial:
        partial.mkdir()
        yield partial
        _sync(partial)
        _rename(partial, out)


@contextmanager
def written_file(out: Path) -> Iterator[Path]:
    """A path beside `out` whose file takes its place, whole, at the end of a with block; after an error it is gone.

    Raises MoefyError if the disk is full or the file cannot be written.
    """
    with _beside(out) as partial:
        yield partial
        put_in_place(partial, out)


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """The path beside `out` to write first; what is there at the end of a with block is removed."""
    partial = _partial(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _clear_stale(out)
        yield partial
    except (OSError, SafetensorError) as error:
        raise MoefyError(why_not_written(error, out)) from None
    finally:
        with suppress(OSError):
            _remove(partial)


def recover(name: str | os.PathLike[str]) -> None:
    """Undo an overwrite of a directory that was cut off between its two renames; nothing to do for other names."""
    _recover(_place(name))


def load(path: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """A converted model from disk; `options` go to transformers' from_pretrained (dtype, device_map, ...).

    Raises MoefyError if it is not a converted model, or if its config or its weights are damaged or incomplete.
    """
    folder = _place(path)
    _recover(folder)
    if not folder.is_dir():
        what = f"{path} is a file and" if folder.exists() else f"There is nothing at {path},"
        raise MoefyError(f"{what} no directory of a converted model; convert writes one.")
    config = check_directory(folder)
    converted = config.get("model_type") == hf.MODEL_TYPE
    if not converted and not _is_slim(folder):
        raise MoefyError(
            f"{path} is not a model that moefy converted (its model type is {config.get('model_type')}); "
            f"convert it, or load it with transformers."
        )
    try:
        with quiet_transformers():
            base = _base_class(path, config)
            dtype = options.pop("dtype", "auto")
            if converted:
                if "config" not in options:  # options may be for it: what is left of them is the model's
                    stored, options = hf.MoefyConfig.from_pretrained(folder, return_unused_kwargs=True, **options)
                    options["config"] = stored
                base = hf.model_class(base, type(options["config"]))
            model, info = weights_of(base, folder, dtype=dtype, **options)
    except LOAD_ERRORS as error:
        raise MoefyError(f"The model {os.fspath(path)!r} cannot be loaded: {reason(error)}") from None
    check_complete(model, info, os.fspath(path))
    check_weights(model)
    return model


def _base_class(path: str | os.PathLike[str], config: dict[str, Any]) -> Any:
    """The class of the dense model that a checkpoint was made from."""
    match config.get("architectures"):
        case [str(first), *_] if first.removeprefix("Moefy"):
            name = first.removeprefix("Moefy")
        case _:
            raise MoefyError(f"The config.json of {path} names no class (architectures); copy or download it again.")
    base = getattr(transformers, name, None) or getattr(bamboo, name, None)
    if base is None:
        raise MoefyError(f"This transformers ({transformers.__version__}) has no {name}, which {path} needs.")
    if not (isinstance(base, type) and issubclass(base, PreTrainedModel)):
        raise MoefyError(f"{path} says it is a {name}, which is no model; correct its config.json.")
    return base


def _is_slim(folder: Path) -> bool:
    try:
        return slim.is_slim(parse_json((folder / "report.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # none, or another tool's


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model again, with the weights that the converted one holds, in their own order.

    MoefyError if a refit has added output biases that the architecture has no place for, or if experts are weighted.
    """
    dense = hf.bare_model(model)
    for tensor in {id(t): t for t in (*dense.parameters(), *dense.buffers())}.values():
        tensor.data = tensor.data.clone()
    for site in find_sites(dense):
        moe: Any = model.get_submodule(site.entry_name)
        if moe.spec.gate_scale:
            raise MoefyError(f"The experts of {site.name} have a gate scale, which a dense FFN has no place for.")
        ffn = moe.to_dense()
        if ffn.down_bias is not None and site.read().down_bias is None:
            raise MoefyError(
                f"The refit has added an output bias to {site.name}, which a {type(dense).__name__} cannot hold; "
                f"convert with output_bias: false for a model that can be dense again."
            )
        site.write(ffn)
    return dense.eval()


def _write(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: Any,
    source: str | None,
    figures: dict[str, float] | None,
    record: dict[str, Any],
) -> None:
    mend_generation(model)
    with quiet_transformers():
        (slim.ordinary(model) if slim.is_slim(record) else model).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if slim.is_slim(record):  # an ordinary model: what loads the source loads it
        say_for_older(folder)
    for name, companion in _companions(source).items():
        if not (folder / name).exists():
            shutil.copyfile(companion, folder / name)
    (folder / "recipe.yaml").write_text(Recipe.of(record["recipe"]).to_yaml(), encoding="utf-8")
    report = {**record, **({"slim": slim.summary(record)} if slim.is_slim(record) else {}), "figures": figures or {}}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(model, source, figures or {}), encoding="utf-8")


def _companions(source: str | None) -> dict[str, Path]:
    """Files of the source, a directory or a hub name, that come along as they are."""
    if not source:
        return {}
    origin = local_path(source)
    if not origin.exists():
        return hub.files(source, _COMPANIONS)
    return {name: origin / name for name in _COMPANIONS if (origin / name).is_file()}


def mend_generation(model: Any) -> None:
    """A model's generation settings as transformers will save them: it refuses some that it loads.

    The commonest, a temperature without `do_sample`, is meant to sample; others give way to the config's own.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or _valid(settings):
        return
    model.generation_config = copy.deepcopy(settings)
    model.generation_config.do_sample = True
    if not _valid(model.generation_config):
        model.generation_config = GenerationConfig.from_model_config(model.config)


def _valid(settings: GenerationConfig) -> bool:
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True


def _place(path: str | os.PathLike[str]) -> Path:
    """The absolute path behind a path as it was typed, links followed: what a rename has to replace."""
    try:
        place = local_path(path).resolve()
        str(place).encode()  # torch and safetensors take no name of other bytes, and say so at the end
        return place
    except (RuntimeError, ValueError, OSError) as error:  # links in a circle, a zero byte
        raise MoefyError(f"{os.fspath(path)!r} cannot be used as a path: {reason(error)}") from None


def _partial(out: Path) -> Path:
    """Where this process writes what becomes `out`."""
    return out.parent / f".{out.name}.partial-{os.getpid()}"


def _in_use(partial: Path) -> bool:
    """Whether another living process writes there, by the number in its name."""
    number = partial.name.rpartition("-")[2]
    if not number.isdecimal() or int(number) == os.getpid():
        return not number.isdecimal()
    try:
        os.kill(int(number), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True


def _clear_stale(out: Path) -> None:
    """Remove what processes that were killed have left beside `out`."""
    for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        if not _in_use(stale):
            _remove(stale)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _probe(out: Path) -> None:
    """Make what `written` will make and take it away again, the parents too; OSError if that is not possible."""
    _clear_stale(out)
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        _partial(out).mkdir(parents=True, exist_ok=True)
    finally:
        for folder in (_partial(out), *made):
            with suppress(OSError):
                folder.rmdir()


def _rename(partial: Path, out: Path) -> None:
    old = _old(out)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    _sync(out.parent, files=False)


def _old(out: Path) -> Path:
    return out.parent / f".{out.name}.old"


def _recover(out: Path) -> None:
    """Undo an overwrite that was cut off between its two renames. Whoever reads deletes nothing: see `check_output`."""
    if not out.exists() and _old(out).exists() and is_model_directory(_old(out)):  # somebody else's may be called so
        _old(out).rename(out)


def _sync(folder: Path, files: bool = True) -> None:
    for path in [*(folder.iterdir() if files else ()), folder]:
        sync(path)


def why_not_written(error: Exception, out: Path) -> str:
    """The sentence for an output that could not be written; what was there before still is."""
    text = str(error)
    if (
        getattr(error, "errno", None) == errno.ENOSPC
        or "No space left" in text
        or "os error 28" in text
        or "requested and" in text  # "... items requested and ... written": numpy, for a GGUF
    ):
        left = "what was there before is unchanged" if out.exists() or _old(out).exists() else "nothing is left of it"
        return f"The disk is full: {out} was not written, and {left}; free some space and try again."
    why = getattr(error, "strerror", None) or reason(error)
    return f"{out} cannot be written: {why.rstrip('.')}; choose another output."
