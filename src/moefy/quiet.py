"""transformers without its own bars and warnings, and what it would show as a bar as a count."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging


@contextmanager
def loading(update: Callable[[int, int], None]) -> Iterator[None]:
    """Count with `update(done, total)` what transformers would show bars for: the tensors of a model that is loaded."""
    before = 0

    def counted(things: Iterable[Any], total: int) -> Iterator[Any]:
        nonlocal before
        for i, thing in enumerate(things):
            update(before + i, before + total)
            yield thing
        before += total
        update(before, before)

    def hook(factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Sized) and isinstance(args[0], Iterable):
            args = (counted(args[0], len(args[0])), *args[1:])
        return factory(*args, **options)

    previous = transformers_logging.set_tqdm_hook(hook)
    try:
        yield
    finally:
        transformers_logging.set_tqdm_hook(previous)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and warnings off the terminal for a while."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    own_bar = modeling_gguf_pytorch_utils.tqdm  # not transformers', so it heeds none of this
    modeling_gguf_pytorch_utils.tqdm = transformers_logging.tqdm
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = own_bar
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
