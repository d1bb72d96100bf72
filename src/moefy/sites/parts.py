"""The parts of a model that have a config of their own: the towers of CLIP, the text part of LLaVA."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig


def base_model_type(config: object) -> str:
    """The architecture's name: of the source model, for a model that moefy converted."""
    return getattr(config, "base_model_type", None) or config.model_type  # type: ignore[attr-defined]


def config_by_module(model: nn.Module) -> dict[str, Any]:
    """The config of the innermost model around each module, by the module's name."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        outer = found.get(name.rpartition(".")[0], model.config)
        found[name] = own if isinstance(own, PretrainedConfig) else outer
    return found


def text_config(config: Any) -> Any:
    try:
        return config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # it has several (MusicGen)
        return config


def config_path(whole: Any, part: Any) -> str | None:
    """The dotted path from a model's config to that of a part, "" for itself or its copy (T5's decoder has one).

    None if the parts that it could be are alike (an encoder and a decoder of one kind).
    """
    paths = dict(_walk(whole))
    same = [path for path, config in paths.items() if config is part]
    alike = [path for path, config in paths.items() if base_model_type(config) == base_model_type(part)]
    return same[0] if same else alike[0] if len(alike) == 1 else None


def _walk(config: Any, path: str = "") -> list[tuple[str, Any]]:
    found = [(path, config)]
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if isinstance(sub, PretrainedConfig):
            found += _walk(sub, f"{path}.{name}".lstrip("."))
    return found
