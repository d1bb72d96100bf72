"""Converted models for other engines: as an architecture that they run already, unmodified.

An exporter is one file and one line in EXPORTERS (options of its own are two more in cli/export.py). Everything is
written beside the place and renamed. What the engines cannot express is refused before anything is written, and the
stock model is run beside the converted one, so nothing is approximated without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.calibrate import rows_of
from moefy.checkpoint import check_output
from moefy.errors import MoefyError
from moefy.export import directory, gguf
from moefy.export.base import Exporter
from moefy.export.glm4_moe import check, stock
from moefy.moe import moe_layers

#: By the name of the format.
EXPORTERS: dict[str, Exporter] = {"transformers": directory.EXPORTER, "gguf": gguf.EXPORTER}
# The stock model's logits may be so far from the converted one's, as a share of their norm: in float32 SmolLM2 comes to
# 0.004 to 0.014, by choices that were near ties; what is wrong is as far as the logits are long. Half types round too.
FARTHEST, FARTHEST_HALF = 0.1, 0.2


@dataclass(frozen=True)
class Exported:
    """What an export did: the place, and ‖stock - converted‖ / ‖converted‖ of the logits of the probed tokens."""

    path: Path
    difference: float
    tokens: int


def form_of(path: str | os.PathLike[str]) -> str:
    """The format that a name is of, by its end."""
    end = Path(path).suffix.lower()
    return next((form for form, e in EXPORTERS.items() if e.suffix and e.suffix == end), "transformers")


def check_place(
    path: str | os.PathLike[str], form: str, overwrite: bool, *sources: str | os.PathLike[str] | None
) -> Path:
    """Where a format is written, links followed; MoefyError, as of `check_output`, if it cannot be or is a source."""
    exporter = EXPORTERS[form]
    for source in sources or (None,):
        out = check_output(path, overwrite, source, exporter.kind, exporter.is_one)
    return out


def export(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    tokenizer: Any,
    ids: Tensor,
    *,
    form: str = "transformers",
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Write a converted model for stock engines, as `form` of EXPORTERS.

    `ids` (N, L) are token ids like those that the model will see: they say how large router logits are, and both models
    run on them. `options` go to the exporter. MoefyError if the model cannot be expressed, or if the path exists.
    """
    if form not in EXPORTERS:
        raise MoefyError(f"There is no format {form!r}; use one of {', '.join(EXPORTERS)}.")
    check(model)
    asked = {name: value for name, value in options.items() if name in EXPORTERS[form].options}
    out = check_place(path, form, overwrite, EXPORTERS[form].check(**asked))
    with torch.inference_mode():
        with _router_spreads(model) as spreads:
            wanted = model(input_ids=ids, use_cache=False).logits.float()
        made = stock(model, spreads)
        got = made(input_ids=ids, use_cache=False).logits.float()
    difference = float((got - wanted).norm() / wanted.norm())
    if not difference <= (FARTHEST if model.dtype == torch.float32 else FARTHEST_HALF):
        raise MoefyError(
            f"The model for other engines computes something else ({difference:.1%} off on {ids.numel()} tokens), so "
            f"it was not written; report it with the name of the dense model."
        )
    EXPORTERS[form].write(made, out, tokenizer, **options)
    return Exported(out, difference, ids.numel())


@contextmanager
def _router_spreads(model: PreTrainedModel) -> Iterator[dict[str, float]]:
    """For the length of a with block: how far apart each layer's router logits of one token are (their deviation)."""
    spreads: dict[str, float] = {}

    def watch(name: str, moe: Any) -> Any:
        def hook(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            logits = rows_of(args, kwargs).float() @ moe.router.weight.float().t()
            spreads[name] = max(float(logits.std(dim=1).mean()), 1e-20)

        return moe.register_forward_pre_hook(hook, with_kwargs=True)

    hooks = [watch(name, moe) for name, moe in moe_layers(model).items() if moe.router is not None]
    try:
        yield spreads
    finally:
        for hook in hooks:
            hook.remove()
