"""Conditional FFN kernels, interchangeable: the same call, the same result. Chosen here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from moefy.kernels import grouped, reference
from moefy.types import MoefyError, MoEWeights

Kernel = Callable[[Tensor, MoEWeights, Tensor, "Tensor | None"], Tensor]

KERNELS: dict[str, Kernel] = {
    "reference": reference.moe_ffn,
    "grouped": grouped.moe_ffn,
}

_choice = os.environ.get("MOEFY_KERNEL", "auto")


def use(name: str) -> None:
    """Run every conditional FFN on the named kernel; "auto" picks the fastest that can."""
    global _choice
    if name not in (*KERNELS, "auto"):
        raise MoefyError(f"There is no kernel {name!r}; choose one of auto, {', '.join(KERNELS)}.")
    _choice = name


@contextmanager
def using(name: str) -> Iterator[None]:
    """`use(name)` for the length of a with block."""
    before = _choice
    use(name)
    try:
        yield
    finally:
        use(before)


def pick(x: Tensor, weights: MoEWeights) -> Kernel:
    """The kernel for this call."""
    if _choice != "auto":
        return KERNELS[_choice]
    return grouped.moe_ffn if grouped.supports(x, weights) else reference.moe_ffn
