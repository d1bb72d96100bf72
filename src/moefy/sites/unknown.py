"""What to tell somebody whose model no row of FAMILIES describes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from moefy.sites.families import EXPERT_COUNTS, FAMILIES, LEFT_OUT
from moefy.sites.linears import is_linear, rows
from moefy.sites.parts import base_model_type

# Its projections may widen too.
_ATTENTION = re.compile("att|self", re.IGNORECASE)


def explain_unknown(model: nn.Module, parts: Mapping[str, Any], failed: Sequence[str]) -> str:
    """One sentence; `parts` are the configs of the parts that modules belong to, by the modules' names.

    `failed` are modules that are laid out like FFNs and compute something else.
    """
    types = {name: base_model_type(config) for name, config in parts.items()}
    known = [name for name in dict.fromkeys(types.values()) if name in LEFT_OUT]
    if known:
        return f"moefy does not convert the architecture {known[0]!r}: {LEFT_OUT[known[0]]}."
    if failed:
        return (
            f"moefy does not convert the architecture {types[failed[0]]!r}: {failed[0]} has the matrices of an FFN and "
            f"does not compute what they say; a norm, a limit, a factor or something else comes between."
        )
    if any(getattr(config, name, None) for config in parts.values() for name in EXPERT_COUNTS):
        return (
            f"This {type(model).__name__} is a mixture of experts whose layout moefy does not know; where its experts "
            f"are up and down matrices in one module, add its model type to FAMILIES in moefy/sites/families.py "
            f"(CONTRIBUTING.md shows how)."
        )
    in_table = {name for family in FAMILIES for name in family.model_types}  # of another part, which stays as it is
    found: Counter[tuple[str, str, str]] = Counter()
    for name, module in model.named_modules():
        if re.search(_ATTENTION, name) or types[name] in in_table:
            continue
        where = re.sub(r"\b[0-9]+\b", "*", name) or "(top)"
        for ups, down in _pairs(module):
            found[types[name], where, f"{ups} -> {down}"] += 1
    if not found:
        return (
            f"The architecture {types['']!r} has no FFNs of two or three linears that moefy could find, "
            f"so there is nothing to convert."
        )
    listed = "; ".join(f"{where} ({what}) x{n}" for (_, where, what), n in found.most_common(6))
    return (
        f"The architecture {found.most_common(1)[0][0][0]!r} is not in moefy's table of families; FFN-like modules "
        f"here: {listed}. Where only an activation lies between the linears, add a row for it to FAMILIES in "
        f"moefy/sites/families.py (CONTRIBUTING.md shows how)."
    )


def _pairs(module: nn.Module) -> list[tuple[str, str]]:
    """The linears that widen and the one that narrows again, among the children and grandchildren of a module.

    Those of one child are that child's.
    """
    if isinstance(module, nn.ModuleList):
        return []  # of layers
    shapes = {
        name: tuple(rows(m)[0].shape)
        for name, m in module.named_modules()
        if is_linear(m) and name.count(".") <= 1 and not re.search(_ATTENTION, name)
    }
    found = []
    for down, (width, neurons) in shapes.items():
        ups = [
            name
            for name, (out, into) in shapes.items()
            if into == width < neurons and out in (neurons, 2 * neurons) and _apart(name, down)
        ]
        if ups:
            found.append((", ".join(ups), down))
    return found


def _apart(up: str, down: str) -> bool:
    one, other = up.split("."), down.split(".")
    return up != down and not (len(one) == len(other) == 2 and one[0] == other[0])
