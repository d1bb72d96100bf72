"""A model directory on disk, before anything loads it: whether it is whole, plain and safe to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moefy.errors import MoefyError
from moefy.files import parse_json

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
# Sizes in a config, by the names of several families, that are above 0 or not given.
_SIZES = {
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("n_embd", "n_layer", "n_head", "d_model", "d_ff", "num_layers", "num_heads", "intermediate_size"),
}
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer")


def check_directory(path: Path) -> dict[str, Any]:
    """The config of a model directory; MoefyError unless it and the safetensors files are there and whole."""
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise MoefyError(
                f"{path} holds an adapter and no model; merge it into its base model first (peft's merge_and_unload)."
            )
        if (path / "model_index.json").is_file():
            raise MoefyError(
                f"{path} is a pipeline of models; give the directory of one, such as {path / 'text_encoder'}."
            )
        raise MoefyError(f"{path} has no config.json, so it is not a model directory{_but_gguf(path)}.")
    if (path / "adapter_config.json").is_file():  # transformers would apply it without a word
        raise adapter_error(str(path))
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = [f.name for pattern in _PICKLES for f in path.glob(pattern)]
        if pickles:
            raise MoefyError(
                f"{path} holds its weights as {pickles[0]}, a format that can run code when loaded; "
                f"convert it to safetensors first (transformers' save_pretrained writes them)."
            )
        raise MoefyError(f"{path} has no weights (*.safetensors){_but_gguf(path)}.")
    names: set[str] = set()
    quantised: set[str] = set()
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names |= set(opened.keys())
                quantised |= {name for name in opened.keys() if _has_other_type(name, opened.get_slice(name))}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise MoefyError(f"{file} is truncated or corrupt ({error}); copy or download it again.") from None
    index = path / "model.safetensors.index.json"
    if not (path / "model.safetensors").exists():  # else nobody reads the index
        if not index.exists():
            raise MoefyError(
                f"{path} holds {files[0].name}, and what is read is model.safetensors or the files that {index.name} "
                f"lists; rename it, or copy or download that index too."
            )
        _check_index(index)
    config = read_config(path)
    _check_layers(config, len(names), path)
    if quantised and not any("quantization_config" in part for part in (config, config.get("text_config") or {})):
        raise quantised_error(str(path), f"as {min(quantised)} is, by what config.json does not say")
    return config


def _but_gguf(path: Path) -> str:
    """Which GGUF file of a directory to give instead of it, as the end of a sentence; empty if there is none."""
    found = sorted(path.glob("*.gguf"))
    return f"; give the GGUF file in it, such as {found[0]}" if found else ""


def _has_other_type(name: str, weight: Any) -> bool:
    """Whether a matrix in a file is of a type that quantised ones have: transformers takes its values as they are."""
    plain = weight.get_dtype() in ("F16", "BF16", "F32", "F64")
    return name.endswith("weight") and len(weight.get_shape()) > 1 and not plain


def read_config(folder: Path) -> dict[str, Any]:
    """A model directory's config.json; MoefyError if it cannot be read or is not an object in JSON."""
    file = folder / "config.json"
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise MoefyError(f"{file} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise MoefyError(f"{file} is damaged (it is not a JSON object); copy or download it again.")
    _check_sizes(config, file)
    return config


def _check_sizes(config: dict[str, Any], file: Path) -> None:
    """MoefyError for a size that no model has; a library would divide by it, or ask for so many numbers."""
    for name, value in config.items():
        if isinstance(value, dict) and name == "text_config":
            _check_sizes(value, file)
        if name in _SIZES and isinstance(value, (int, float)) and not value > 0:
            raise MoefyError(f"{file} says {name}: {json.dumps(value)}, which no model can have; correct it.")


def _check_index(file: Path) -> None:
    """MoefyError unless the list of which shard has which weight is one, and its shards are there."""
    try:
        shards = set(parse_json(file.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(s for s in shards if Path(s).name != s or not (file.parent / s).is_file())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise MoefyError(f"{file} is damaged; copy or download it again.") from None
    if missing:
        raise MoefyError(f"{file.parent} lacks {missing[0]}, which {file.name} names; copy or download it again.")


def _check_layers(config: dict[str, Any], tensors: int, path: Path) -> None:
    """MoefyError for far more layers than weights: transformers would make them, a minute for 100,000, to miss them."""
    for part in (config, config.get("text_config")):
        counts = [part.get(name) for name in _LAYERS] if isinstance(part, dict) else []
        for count in counts:
            if isinstance(count, int) and count > max(1000, tensors):
                raise MoefyError(
                    f"The config.json of {path} describes {count:,} layers and its files hold {tensors:,} weights; "
                    f"copy or download it again."
                )


def adapter_error(name: str) -> MoefyError:
    """The error for an adapter that lies beside a model."""
    return MoefyError(f"{name} holds an adapter beside its model; merge it (merge_and_unload) or move it away.")


def quantised_error(name: str, method: str) -> MoefyError:
    """The error for weights that are no plain floats; `method` says how they are stored."""
    return MoefyError(
        f"The weights of {name} are quantised ({method}), and moefy needs the unquantised ones; "
        f"give the model that it was made from."
    )
