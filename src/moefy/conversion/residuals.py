"""Where the residual stream runs past each FFN: found by running the model once, not from its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moefy.calibrate import without_cache
from moefy.sites import Site

# Rows of a batch that are compared, evenly spread over it.
ROWS = 16
# The sum must match to this part of the FFN's output. In float32 it does to 1e-5; in bfloat16 to a few percent where
# the stream is ten times as long as the output.
CLOSE = 0.1


@dataclass(frozen=True)
class _Seen:
    """A tensor that a module was given (`is_input`) or gave, some of its rows, in the order of the pass."""

    name: str
    is_input: bool
    rows: Tensor


@torch.no_grad()
def find_residuals(model: nn.Module, sites: Mapping[str, Site], batch: Mapping[str, Any]) -> dict[str, str]:
    """For each site the module whose first input is the residual stream that the FFN's output is added to.

    It is the tensor r before the FFN for which r + FFN(x) is seen after it: in a pre-norm block the input of the norm,
    in a post-norm block (BERT) the FFN's own. A site is left out where there is none: blocks whose FFN runs beside the
    attention (Falcon, GPT-NeoX), or whose output is normed or scaled before it is added (Gemma 2, OLMo 2).
    """
    seen = _run(model, batch)
    entries = [i for i, s in enumerate(seen) if s.is_input and s.name in sites]
    found: dict[str, str] = {}
    for k, i in enumerate(entries):
        here = seen[i]
        if here.name in found:
            continue
        before = seen[entries[k - 1] + 1 if k else 0 : i + 1]
        after = seen[i + 1 : (entries[k + 1] if k + 1 < len(entries) else len(seen)) + 1]
        y = sites[here.name].read().forward(here.rows).float()
        sums = [s.rows for s in after if _distance(torch.zeros_like(y), y, s.rows) > 1e-3]  # what is not y itself
        best = min(
            ((_distance(r.rows, y, rows), -j, r.name) for j, r in enumerate(before) if r.is_input for rows in sums),
            default=None,
        )
        if best is not None and best[0] < CLOSE:
            found[here.name] = best[2]
    return found


def _distance(r: Tensor, y: Tensor, out: Tensor) -> float:
    """The median over rows of ‖out - r - y‖ / ‖y‖."""
    if not r.shape == y.shape == out.shape:
        return float("inf")
    away = (out.float() - r.float() - y).norm(dim=1) / y.norm(dim=1).clamp_min(1e-30)
    return float(away.nan_to_num(float("inf")).median())


def _run(model: nn.Module, batch: Mapping[str, Any]) -> list[_Seen]:
    seen: list[_Seen] = []

    def note(name: str, is_input: bool, value: object) -> None:
        t = first_tensor(value)
        if t is not None and t.ndim >= 2 and t.is_floating_point():
            rows = t.reshape(-1, t.shape[-1])
            seen.append(_Seen(name, is_input, rows[:: max(1, len(rows) // ROWS)][:ROWS].clone()))

    def before(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: note(name, True, (*args, *kwargs.values()))

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, out: note(name, False, out)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(after(name)))
    try:
        model(**without_cache(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def first_tensor(value: object) -> Tensor | None:
    """The value itself, or the first tensor in it."""
    if isinstance(value, Tensor):
        return value
    return next((t for t in value if isinstance(t, Tensor)), None) if isinstance(value, (tuple, list)) else None
