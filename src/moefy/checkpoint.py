"""Save and load converted models: safetensors, written beside and renamed into place."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from moefy import hf, slim
from moefy.model_card import model_card
from moefy.recipe import Recipe
from moefy.sites import bamboo, find_sites
from moefy.sources import (
    LOAD_ERRORS,
    check_complete,
    check_directory,
    check_weights,
    local_path,
    quiet_transformers,
    reason,
    weights_of,
)
from moefy.types import MoefyError

# Files of the source that a converted model needs as they are.
_COMPANIONS = ("preprocessor_config.json", "processor_config.json", "chat_template.jinja")


def check_output(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """The output path, or a MoefyError if something is there that may not be replaced."""
    out = Path(path).expanduser().absolute()
    _recover(out)
    if out.exists() and not overwrite:
        raise MoefyError(f"{path} exists already; choose another output or say --overwrite.")
    if out.exists() and not (out / "config.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise MoefyError(f"{path} is not a model directory, so it will not be overwritten.")
    return out


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
    record = getattr(model.config, "moefy", None)
    if not record:
        raise MoefyError("This model is not converted, so there is nothing for moefy to save; convert it first.")
    out = check_output(path, overwrite)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{out.name}.partial-*"):
            shutil.rmtree(stale)
        partial.mkdir()
        _write(model, partial, tokenizer, source, figures, record)
        _sync(partial)
        _rename(partial, out)
    except (OSError, SafetensorError) as error:
        raise MoefyError(_why_not_written(error, out)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def load(path: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """A converted model from disk; `options` go to transformers' from_pretrained (dtype, device_map, ...).

    Raises MoefyError if it is not a converted model, or if its config or its weights are damaged or incomplete.
    """
    folder = local_path(path).absolute()
    _recover(folder)
    if not folder.is_dir():
        raise MoefyError(f"There is no model directory {path}.")
    config = check_directory(folder)
    converted = config.get("model_type") == hf.MODEL_TYPE
    if not converted and not _is_slim(folder):
        raise MoefyError(
            f"{path} is not a model that moefy converted (its model type is {config.get('model_type')}); "
            f"load it with transformers."
        )
    try:
        with quiet_transformers():
            base = _base_class(path, config)
            options = {"dtype": "auto", **options}
            if converted:
                options["config"] = hf.MoefyConfig.from_pretrained(folder)
                base = hf.model_class(base, type(options["config"]))
            model, info = weights_of(base, folder, **options)
    except LOAD_ERRORS as error:
        raise MoefyError(f"The model {os.fspath(path)!r} cannot be loaded: {reason(error)}") from None
    check_complete(model, info, os.fspath(path))
    check_weights(model)
    return model


def _base_class(path: str | os.PathLike[str], config: dict[str, Any]) -> Any:
    """The class of the dense model that a checkpoint was made from."""
    match config.get("architectures"):
        case [str(first), *_]:
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
        return slim.is_slim(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # none, or another tool's


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model again, with the weights that the converted one holds, in their own order."""
    dense = hf.bare_model(model)
    for site in find_sites(dense):
        site.write(model.get_submodule(site.entry_name).to_dense())
    return dense.eval()


def _write(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: Any,
    source: str | None,
    figures: dict[str, float] | None,
    record: dict[str, Any],
) -> None:
    with quiet_transformers():
        (slim.ordinary(model) if slim.is_slim(record) else model).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for name in _COMPANIONS:
        companion = Path(source or "").expanduser() / name
        if source and companion.is_file() and not (folder / name).exists():
            shutil.copyfile(companion, folder / name)
    (folder / "recipe.yaml").write_text(Recipe.of(record["recipe"]).to_yaml(), encoding="utf-8")
    report = {**record, **({"slim": slim.summary(record)} if slim.is_slim(record) else {}), "figures": figures or {}}
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(model, source, figures or {}), encoding="utf-8")


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
    """Undo an overwrite that was cut off between its two renames."""
    if _old(out).exists():
        if out.exists():
            shutil.rmtree(_old(out), ignore_errors=True)
        else:
            _old(out).rename(out)


def _sync(folder: Path, files: bool = True) -> None:
    for path in [*(folder.iterdir() if files else ()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _why_not_written(error: Exception, out: Path) -> str:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text or "os error 28" in text:
        return f"The disk is full: {out} was not written, and nothing is left of it; free some space and try again."
    return f"{out} cannot be written: {text.splitlines()[0] if text else type(error).__name__}."
