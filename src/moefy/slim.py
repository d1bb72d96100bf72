"""Slim models: the neurons that are kept, as an ordinary checkpoint of the source's own architecture.

A conversion with nothing routed is a dense model with narrower FFNs. All FFNs keep the same count, so the
config can say it, and every tool that knows the architecture loads the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from moefy.errors import MoefyError, RecipeError
from moefy.hf import bare_model, config_value
from moefy.moe import MoEFFN, moe_layers
from moefy.sites import base_model_type, config_by_module, config_path, find_sites, size_attributes
from moefy.types import FFNWeights, LayerSpec

# Inference engines quantise and multiply in blocks of 32 along a row (llama.cpp's Q4_0, Q8_0; its k-quants take 256).
BLOCK = 32


def slim_spec(spec: LayerSpec, site: str) -> LayerSpec:
    """The shape of an FFN that keeps `spec.shared` neurons, rounded down to whole blocks, and never runs the others.

    MoefyError if no neuron would be left.
    """
    if spec.shared == 0:
        raise RecipeError(f"The recipe keeps no neuron of {site}; give it a larger budget.")
    kept = spec.shared
    if kept < spec.neurons:  # fewer than a block stay as they are
        kept = kept // BLOCK * BLOCK or kept
    rest = spec.neurons - kept
    return replace(spec, shared=kept, experts=min(1, rest), expert_size=rest, top_k=0, router=None)


def config_sizes(model: Any, specs: Mapping[str, LayerSpec]) -> dict[str, int]:
    """The config attributes that hold the FFN widths of a model, dotted, with the counts of neurons kept.

    `specs` has the shape of each FFN by its dotted name. MoefyError if the config cannot say it: it has no
    such attribute, or one attribute stands for FFNs of different widths.
    """
    found: dict[str, int] = {}
    parts = config_by_module(model)
    for name, spec in specs.items():
        config = parts[name if name in parts else name.rpartition(".")[0]]  # an expert, before it is a module
        model_type, part = base_model_type(config), config_path(model.config, config)
        sizes = size_attributes(config)
        refused = f"A slim {model_type} cannot be saved as an ordinary model"
        if part is None or not sizes:
            raise RecipeError(f"{refused}: its config does not give the width of {name}; use the recipe shared-only.")
        attribute = f"{part}.{sizes[-1 if '.decoder.' in f'.{name}' else 0]}".lstrip(".")
        now = config_value(model.config, attribute)
        same = found.setdefault(attribute, spec.shared) == spec.shared
        # None stands for four times the model's width (GPT-2).
        if now not in (None, spec.neurons) or not same:
            raise RecipeError(
                f"{refused}: config.{attribute} does not give the width of {name} "
                f"({spec.neurons}, {spec.shared} kept); use the recipe shared-only."
            )
    return found


@torch.no_grad()
def ordinary(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model with narrower FFNs that a converted model without routing is: a new one, of the source's class.

    It has the kept neurons in their order in the dense FFN, copied, and all other weights on the converted model's
    memory. MoefyError if an FFN routes, or if the config cannot say the widths.
    """
    layers = moe_layers(model)
    routed = [name for name, moe in layers.items() if moe.top_k and moe.spec.experts]
    if routed or not layers:
        what = f"{routed[0]} has routed experts" if routed else "it is not converted"
        raise MoefyError(f"This model cannot be saved as a slim one: {what}; convert with the recipe slim.")
    plain = bare_model(model, config_sizes(model, {name: moe.spec for name, moe in layers.items()}))
    for site in find_sites(plain):
        kept = _kept(layers[site.entry_name])
        if site.read().neurons != kept.neurons:
            raise RecipeError(
                f"A slim {site.config.model_type} cannot be saved as an ordinary model: {site.name} has another width "
                f"than its config says; use the recipe shared-only."
            )
        site.write(kept)
    return plain.eval()


def bias_note(layers: Mapping[str, LayerSpec], refit: bool) -> str:
    """One sentence: what became of the constant part of the neurons that were removed."""
    if not refit:
        return "The output bias is the dense model's; nothing was refitted."
    if all(spec.down_bias for spec in layers.values()):
        return "The constant part of what was removed is folded into the output bias."
    return "The FFNs have no output bias, so the constant part of what was removed is not folded in."


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What a slim checkpoint's report says beside the conversion's own record (`config.moefy`)."""
    specs = {name: LayerSpec(**spec) for name, spec in record["layers"].items()}
    return {
        "neurons": {name: {"dense": spec.neurons, "kept": spec.shared} for name, spec in specs.items()},
        "output_bias": bias_note(specs, record["recipe"]["refit"]),
    }


def is_slim(record: Mapping[str, Any]) -> bool:
    """Whether a conversion's record asks for an ordinary checkpoint."""
    return bool(record["recipe"].get("slim"))


def _kept(moe: MoEFFN) -> FFNWeights:
    ffn = replace(moe.weights().shared, down_bias=moe.down_bias)
    return ffn._map(lambda name, tensor: tensor.detach().clone())
