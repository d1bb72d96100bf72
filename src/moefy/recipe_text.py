"""A recipe's YAML, and what is wrong with it in a sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import yaml
from pydantic import ValidationError

from moefy.errors import MoefyError


class _Loader(yaml.SafeLoader):
    """As `yaml.safe_load`, but a field that is given twice is an error.

    So is what may take memory or time without end, and no recipe needs: aliases of lists of aliases, and whole numbers
    of thousands of digits.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise MoefyError("The recipe has an alias (*name), which none needs; write the value itself.")
        return super().compose_node(parent, index)

    def construct_yaml_int(self, node: Any) -> int:
        if abs(found := super().construct_yaml_int(node)) >= 2**63:
            raise ValueError
        return found

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        fields = [key.value for key, _ in node.value]
        if twice := [field for field in fields if fields.count(field) > 1]:
            raise MoefyError(f"The recipe gives {twice[0]} twice; keep one of the two.")
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(text: str) -> dict[str, Any]:
    """The fields of a recipe in YAML; MoefyError if it is none."""
    try:
        data = yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise MoefyError(f"The recipe is not YAML: {str(error).splitlines()[0]}.") from None
    except RecursionError:
        raise MoefyError("The recipe nests its YAML too deeply; give one value to a field.") from None
    except (ValueError, LookupError, AttributeError):  # what it raises for a value that is not of its type
        raise MoefyError("The recipe has a date or a number that YAML cannot read; mend or remove it.") from None
    if not isinstance(data, dict):
        raise MoefyError("The recipe must be a YAML mapping, such as `construction: activation`.")
    return data


# Fields of several types, whose mistakes pydantic tells once for each type.
_UNIONS = {
    "shared": "a count such as 3 or a share such as 0.5",
    "active": "a count such as 3 or a share such as 0.5",
    "shared_budget": "a share such as 0.5 or a list of them",
}


def sentence(error: ValidationError, fields: Iterable[str]) -> str:
    """All that is wrong with a recipe of these fields."""
    parts: dict[str, str] = {}
    for e in error.errors():
        where = ".".join(map(str, e["loc"]))
        message = e["msg"].removeprefix("Value error, ")
        if e["type"] == "extra_forbidden":
            message = _unknown(where, fields)
        if len(e["loc"]) > 1 and e["loc"][0] in _UNIONS:
            where = str(e["loc"][0])
            message = f"give {_UNIONS[where]}, and not {str(e['input'])[:40]!r}"
        parts.setdefault(where, f"{where}: {message}" if where else message)
    return "; ".join(parts.values())


def _unknown(field: str, fields: Iterable[str]) -> str:
    near = difflib.get_close_matches(field, fields, 1)
    known = f"the nearest is {near[0]}" if near else f"use one of {', '.join(fields)}"
    return f"there is no such field, {known}"
