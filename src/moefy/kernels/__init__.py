"""Conditional FFN kernels, interchangeable: the same call, the same result.

The native kernel is not in KERNELS: it takes packed weights and does its own routing (`native.PackedFFN`).
MoEFFN uses it for inference on CPU where `native_wanted()` and its own checks agree (`MoEFFN._runs_native`), and what
`pick` chooses of KERNELS for the rest: training, CUDA, activations that only torch has.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from moefy.errors import MoefyError, MoefyWarning
from moefy.kernels import grouped, masked, native, reference
from moefy.types import MoEWeights, has_tangents

Kernel = Callable[[Tensor, MoEWeights, Tensor, "Tensor | None"], Tensor]

KERNELS: dict[str, Kernel] = {
    "reference": reference.moe_ffn,
    "grouped": grouped.moe_ffn,
    "masked": masked.moe_ffn,
}

_CHOICES = ("auto", "native", "torch", *KERNELS)
_choice = os.environ.get("MOEFY_KERNEL") or "auto"
_told = False


def use(name: str) -> None:
    """Run every conditional FFN on one kernel: "native", "torch" (the best of the others), "reference",
    "grouped", "masked", or "auto": native for inference on CPU, torch otherwise."""
    global _choice
    _check_name(name)
    _choice = name


def _check_name(name: str) -> None:
    if name not in _CHOICES:
        raise MoefyError(f"There is no kernel {name!r}; choose one of {', '.join(_CHOICES)}.")
    if name == "native" and not native.available():
        raise MoefyError(f"The native kernel cannot be used: {native.why_not()}.")


def check() -> None:
    """MoefyError if the kernel that MOEFY_KERNEL names does not exist or cannot be used, or MOEFY_ISA names none."""
    try:
        _check_name(_choice)
    except MoefyError as error:
        raise MoefyError(f"In MOEFY_KERNEL: {error}") from None
    if native.available():
        native.default_isa()


def native_wanted() -> bool:
    """Whether inference on CPU should use the native kernel; says once if it would but cannot."""
    global _told
    if native.available() and _choice in ("auto", "native"):  # first: asked in every call of a layer
        return True
    check()
    if _choice == "auto" and not _told:
        _told = True
        warnings.warn(f"moefy runs on torch, slower: {native.why_not()}.", MoefyWarning, stacklevel=2)
    return False


@contextmanager
def using(name: str) -> Iterator[None]:
    """`use(name)` for the length of a with block."""
    global _choice
    before = _choice
    use(name)
    try:
        yield
    finally:
        _choice = before


def pick(x: Tensor, weights: MoEWeights) -> Kernel:
    """The kernel for this call."""
    check()
    if _choice == "grouped" and weights.experts and not grouped.supports(x, weights):
        raise MoefyError(
            f"torch's grouped_mm cannot run inputs {tuple(x.shape)} in {x.dtype} through experts of "
            f"{weights.expert_size}: rows must be a multiple of 16 bytes, in 16 or 32 bits; use another kernel."
        )
    if _choice in KERNELS:
        return KERNELS[_choice]
    if has_tangents():  # which grouped_mm refuses
        return reference.moe_ffn
    if masked.trains_faster(x, weights):
        return masked.moe_ffn
    return grouped.moe_ffn if grouped.supports(x, weights) else reference.moe_ffn
