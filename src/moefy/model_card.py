"""The README.md of a converted checkpoint: what it was made from, how, what it costs, how to load it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import transformers

from moefy.hf import auto_class
from moefy.recipe import Recipe
from moefy.slim import is_slim, summary

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def model_card(model: Any, source: str | None, figures: dict[str, float]) -> str:
    """Markdown with the hub's metadata block."""
    record, config = model.config.moefy, model.config
    recipe = Recipe.of(record["recipe"])
    base = _base_name(source)
    architecture = config.architectures[0].removeprefix("Moefy")
    auto = auto_class(architecture)
    slim = is_slim(record)
    what = "kept" if slim else "active (router included)"
    rows = [
        (f"Share of the FFN multiply-adds {what}", f"{record['active_fraction']:.1%}"),
        ("Calibration tokens", f"{record['calibration']['tokens']:,}"),
        ("Calibration fingerprint", record["calibration"]["fingerprint"]),
        *((f"Fine-tuned ({done['loss']}), tokens", f"{done['tokens']:,}") for done in record.get("tuned", [])),
        *((_plain(name), f"{value:.4g}") for name, value in figures.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    plain = slim and hasattr(transformers, architecture)
    imports = "" if plain else "import moefy  # makes transformers able to load this directory\n"
    library = f"library_name: {'transformers' if slim else 'moefy'}"
    metadata = "\n".join([*([f"base_model: {base}"] if _HUB_NAME.fullmatch(base or "") else []), library])
    made = _slim(architecture, versions, record) if slim else _mixture(architecture, versions)
    return f"""---
{metadata}
tags:
- {"pruning" if slim else "mixture-of-experts"}
- moefy
---

# {_plain(base or architecture)} {"with narrower feed-forward networks" if slim else "as a mixture of experts"}

{made}Base model: {_plain(base or "not recorded")}.

| | |
|---|---|
{table}

## Recipe

{_fenced("yaml", recipe.to_yaml().rstrip())}

## Use

```python
{imports}from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/directory")
```
"""


def _plain(text: str) -> str:
    """Text as Markdown that shows it as it is, on one line: a name may hold anything."""
    line = " ".join(text.encode(errors="replace").decode().split())
    return re.sub(r"([\\`*_{}\[\]<>#|&!~$])", r"\\\1", line)


def _fenced(language: str, text: str) -> str:
    """A code block that nothing in the text ends."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _mixture(architecture: str, versions: str) -> str:
    return (
        f"{architecture} whose feed-forward networks were converted to mixtures of experts after training, with their\n"
        f"own weights, by moefy ({versions}). "
    )


def _slim(architecture: str, versions: str, record: dict[str, Any]) -> str:
    found = summary(record)
    counts = {(n["kept"], n["dense"]) for n in found["neurons"].values()}
    kept = " and ".join(f"{kept:,} of {dense:,}" for kept, dense in sorted(counts))
    return (
        f"{architecture} whose feed-forward networks keep {kept} neurons; chosen, and the down-projections\n"
        f"refitted, by moefy ({versions})\n"
        f"without training. It is an ordinary model of its architecture. {found['output_bias']}\n"
    )


def _base_name(source: str | None) -> str | None:
    """The source's name without the path of the machine it was converted on."""
    if not source:
        return None
    try:
        path = Path(source).expanduser()
        return os.path.basename(os.path.abspath(path)) if path.exists() else source
    except (OSError, RuntimeError, ValueError):  # no path
        return source
