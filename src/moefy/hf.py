"""Converted models as transformers sees them: a model type of their own, loadable by the Auto classes.

A converted LlamaForCausalLM becomes a MoefyLlamaForCausalLM with a MoefyLlamaConfig, subclasses made
here, whose `model_type` is "moefy". So `save_pretrained`, `from_pretrained`, `generate` and peft work
as they are, and a transformers without moefy refuses the directory instead of silently
re-initialising the FFNs that it does not find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from moefy.moe import MoEFFN
from moefy.sites import bamboo, base_model_type, find_sites
from moefy.types import LayerSpec, MoefyError
from moefy.version import __version__

MODEL_TYPE = "moefy"


class MoefyConfig(PretrainedConfig):
    """What AutoConfig finds for model_type "moefy"; reading it gives a subclass of the source's config."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        if cls is not MoefyConfig:
            return super().from_dict(config_dict, **kwargs)
        base = config_dict.get("base_model_type")
        if not base or "moefy" not in config_dict:
            raise MoefyError("This config.json has the model type moefy but lacks base_model_type or moefy.")
        return config_class(type(AutoConfig.for_model(base))).from_dict(config_dict, **kwargs)


@cache
def config_class(base: Any) -> Any:
    """The config class of converted models of one architecture, known to every Auto class that knows `base`."""
    made = type(f"Moefy{base.__name__}", (base,), {"model_type": MODEL_TYPE, "__module__": __name__})
    for auto in vars(modeling_auto).values():
        if isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass) and auto._model_mapping is not None:
            model = auto._model_mapping.get(base, None)
            if isinstance(model, type):
                auto.register(made, model_class(model, made), exist_ok=True)
    return made


@cache
def model_class(base: Any, config: Any) -> Any:
    """The class of converted models of one architecture and head."""

    def __init__(self: PreTrainedModel, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super(made, self).__init__(config, *args, **kwargs)
        mount_empty(self)

    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super(made, cls).from_pretrained(*args, **kwargs)
        _align(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    keep = set(getattr(base, "_keep_in_fp32_modules_strict", None) or ()) | {"router"}
    members = {
        "__init__": __init__,
        "from_pretrained": classmethod(from_pretrained),
        "__module__": __name__,
        "config_class": config,
        "_keep_in_fp32_modules_strict": keep,
    }
    made = type(f"Moefy{base.__name__}", (base,), members)
    return made


def _align(model: PreTrainedModel) -> None:
    """Copy weights that do not start on a cache line, as tensors mapped from a file seldom do.

    Matrix products round differently on such memory (by an ulp, on x86), so a reloaded model would not
    repeat the bits of the one that was saved; and they run slower there.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def mount_empty(model: PreTrainedModel) -> None:
    """Replace the dense FFNs of a fresh model by empty MoEFFNs of the shapes that its config names."""
    layers = getattr(model.config, "moefy", {}).get("layers", {})
    for site in find_sites(model):
        # A model loaded without its head names its layers without the head's prefix.
        spec = layers.get(site.entry_name) or _by_suffix(layers, site.entry_name)
        if spec is not None:
            site.mount(MoEFFN(LayerSpec(**spec), dtype=site.owner_dtype).requires_grad_(False))


def _by_suffix(layers: Mapping[str, dict], name: str) -> dict | None:
    found = [spec for full, spec in layers.items() if full.endswith(f".{name}") or name.endswith(f".{full}")]
    return found[0] if len(found) == 1 else None


def mark_converted(model: Any, specs: Mapping[str, LayerSpec], record: dict[str, Any]) -> None:
    """Give a model whose FFNs have been replaced its converted class and config, in place."""
    config = model.config
    base_type, base_config, base_model = base_model_type(config), type(config), type(model)
    config.__class__ = config_class(base_config)
    config.base_model_type = base_type
    config.architectures = [base_model.__name__]
    config.moefy = {"versions": versions(), **record, "layers": {n: asdict(s) for n, s in specs.items()}}
    config.dtype = model.dtype
    model.__class__ = model_class(base_model, type(config))
    model.config = config


def base_class(model: PreTrainedModel) -> Any:
    """The transformers class that a converted model was made from."""
    return next(c for c in type(model).__mro__ if c.__module__ != __name__)


def versions() -> dict[str, str]:
    """Versions that decide a conversion's numbers."""
    return {"moefy": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def register() -> None:
    """Make the Auto classes know converted models; called once by `import moefy`."""
    AutoConfig.register(MODEL_TYPE, MoefyConfig, exist_ok=True)
    bamboo.register()
