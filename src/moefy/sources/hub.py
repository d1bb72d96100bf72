"""The Hugging Face hub, asked once and quickly: without a network its own way is to retry for minutes, line by line."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

# Seconds to wait for the hub's answer.
PATIENCE = 10.0


def failure(name: str, kind: str = "model") -> Exception | None:
    """What the hub, or the way to it, says against reading a "model" or "dataset" of that name; None if nothing."""
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE)
    except Exception as error:  # whatever the HTTP client raises: unreachable, unknown, gated, no such name
        return error
    return None


@contextmanager
def quiet(cached_only: bool = False) -> Iterator[None]:
    """Keep the lines and bars of the hub's packages off the terminal; with `cached_only`, off the network too."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    level, bars = huggingface_hub.logging.get_verbosity(), not are_progress_bars_disabled()
    datasets: Any = sys.modules.get("datasets")
    with ExitStack() as undo:
        undo.callback(huggingface_hub.logging.set_verbosity, level)
        huggingface_hub.logging.set_verbosity_error()
        if bars:
            undo.callback(enable_progress_bars)
            disable_progress_bars()
        if datasets is not None:
            undo.callback(datasets.logging.set_verbosity, datasets.logging.get_verbosity())
            datasets.logging.set_verbosity_error()
            if datasets.is_progress_bar_enabled():
                undo.callback(datasets.enable_progress_bars)
                datasets.disable_progress_bars()
        for settings in (constants, *([datasets.config] if datasets is not None else [])):
            undo.callback(setattr, settings, "HF_HUB_OFFLINE", settings.HF_HUB_OFFLINE)
            settings.HF_HUB_OFFLINE = settings.HF_HUB_OFFLINE or cached_only
        yield


def files(name: str, wanted: Sequence[str]) -> dict[str, Path]:
    """Those of the wanted files that a model has which was loaded from the hub, by name; none of any other model."""
    with quiet(cached_only=True):
        if _file(name, "config.json") is None:
            return {}
    with quiet(cached_only=failure(name) is not None):
        found = {file: _file(name, file) for file in wanted}
    return {file: path for file, path in found.items() if path is not None}


def _file(name: str, file: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # of a name that is none, and of a hub that does not answer
        return None
    return Path(found) if found else None
