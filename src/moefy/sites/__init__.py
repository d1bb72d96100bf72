"""Find the FFNs of a model, read their weights, mount what replaces them, write weights back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from moefy.errors import MoefyError, MoefyWarning
from moefy.sites.experts import Expert, ExpertList, ExpertSite, expert_names, join_experts, token_rows
from moefy.sites.families import FAMILIES, Family
from moefy.sites.parts import base_model_type, config_by_module, config_path, text_config
from moefy.sites.site import Site, fits, size_attributes
from moefy.sites.trial import tried
from moefy.sites.unknown import explain_unknown

__all__ = [
    "FAMILIES",
    "ExpertList",
    "ExpertSite",
    "Family",
    "Site",
    "base_model_type",
    "config_by_module",
    "config_path",
    "find_sites",
    "join_experts",
    "size_attributes",
    "text_config",
    "token_rows",
]

# Those that the table names.
_TYPES = {name for family in FAMILIES for name in family.model_types}


def find_sites(model: nn.Module) -> list[Site]:
    """Every dense FFN of a transformers model, in the order of its modules; each expert of a mixture is one.

    Of a model that sees or hears and writes text, such as LLaVA, those of the text part: text is what calibrates it.
    An architecture that no row of FAMILIES names is tried (`trial.py`). Raises MoefyError where that
    finds nothing, and warns of what looks like an FFN and is none.
    """
    text, parts = text_config(model.config), config_by_module(model)
    # Towers are in a row with the model around them.
    whole = base_model_type(model.config)
    towers = {name for family in FAMILIES if whole in family.model_types for name in family.model_types}
    sites = _in_table(model, parts, lambda config: isinstance(config, type(text)) or base_model_type(config) in towers)
    failed: list[str] = []
    if not sites:
        sites, failed = tried(model, parts, lambda config: isinstance(config, type(text)))
    if not sites and text is model.config:  # no part is the text's: all FFNs are in a backbone or an encoder
        sites = _in_table(model, parts, lambda config: True)
        others, failed = tried(model, parts, lambda config: base_model_type(config) not in _TYPES)
        order = {name: i for i, name in enumerate(parts)}
        sites = sorted([*sites, *others], key=lambda s: order[s.layer_name if isinstance(s, ExpertSite) else s.name])
    if not sites:
        raise MoefyError(explain_unknown(model, parts, failed))
    if failed:
        warnings.warn(
            f"What has the matrices of an FFN and computes something else stays as it is: {failed[0]}"
            f"{f' and {len(failed) - 1} more' if failed[1:] else ''}.",
            MoefyWarning,
            stacklevel=2,
        )
    return sites


def _in_table(model: nn.Module, parts: Mapping[str, Any], wanted: Callable[[Any], bool]) -> list[Site]:
    """The FFNs that rows of FAMILIES describe, in the parts of a model whose configs are wanted."""
    sites: list[Site] = []
    for name, module in model.named_modules():
        if isinstance(module, Expert) or not wanted(parts[name]):
            continue
        for family in FAMILIES:
            if base_model_type(parts[name]) in family.model_types:
                sites += [Site(model, name, family, parts[name])] if fits(name, module, family) else []
                sites += [ExpertSite(model, n, family, parts[name]) for n in expert_names(name, module, family)]
    return sites
