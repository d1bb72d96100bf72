"""The compiled extension: whether it is there, and for which instruction sets."""

from __future__ import annotations

import ctypes
import importlib
import os
from typing import Any

import torch  # noqa: F401 - before the extension: torch's wheel brings the libgomp whose thread pool both must share

from moefy.errors import MoefyError

EXTENSION: Any = None
_why_not: str | None = None
_wanted = os.environ.get("MOEFY_NATIVE", "1")
if _wanted.lower() in ("0", "no", "off", "false"):
    _why_not = f"it is turned off with MOEFY_NATIVE={_wanted}"
else:
    try:
        EXTENSION = importlib.import_module("moefy.kernels._native")
    except ImportError as error:
        _why_not = f"the extension was not built or cannot be loaded ({error})"


def available() -> bool:
    """Whether the extension can be used."""
    return EXTENSION is not None


def why_not() -> str | None:
    """Why it cannot be used, as the end of a sentence; None when it can."""
    return _why_not


def instruction_sets() -> list[str]:
    """What this machine can run, the fastest last."""
    return list(EXTENSION.instruction_sets()) if available() else []


def default_isa() -> str:
    """The fastest, or the one that the environment variable MOEFY_ISA names; MoefyError if there is no such."""
    forced = os.environ.get("MOEFY_ISA")
    if forced and forced not in instruction_sets():
        raise MoefyError(f"MOEFY_ISA={forced} is none of {', '.join(instruction_sets())}; set one of them, or none.")
    return forced or instruction_sets()[-1]


def return_freed_memory() -> None:
    """Hand freed heap memory back to the system (glibc keeps it: SmolLM2 held 1.21 times its weights after
    packing layer by layer, 1.05 times with this)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
