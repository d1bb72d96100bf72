"""What a format of exported models is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from moefy.checkpoint import is_model_directory


@dataclass(frozen=True)
class Exporter:
    """One format: `write(made, out, tokenizer, *, progress, **options)` writes a stock model to a place.

    `options` are the names of those it has besides; `check(**options)` raises MoefyError for what can be known to be
    wrong before a model is loaded, and gives the file that an option names, which must not be written over. A name
    that ends in `suffix` is of this format, without one every other; `is_one` knows a `kind`, which may be replaced.
    """

    write: Callable[..., None]
    kind: str = "model directory"
    is_one: Callable[[Path], bool] = is_model_directory
    suffix: str = ""
    options: tuple[str, ...] = ()
    check: Callable[..., Path | None] = lambda: None
