"""Files that are whole or not there, also after a power cut, and that one process at a time writes."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError


def parse_json(text: str) -> Any:
    """`json.loads`; ValueError, too, for lists in lists without an end, as of a damaged or hostile file."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def put_in_place(partial: Path, place: Path) -> None:
    """Give a file that was written beside its place the name it is for: not before it is on the disk."""
    sync(partial)
    os.replace(partial, place)
    sync(place.parent)


def sync(path: Path) -> None:
    """Wait until what a file or a folder holds is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def claimed_folder(folder: Path, taken: str) -> Iterator[None]:
    """The folder, made if need be, for this process alone; left empty it is gone after a with block.

    MoefyError if another process has it; `taken` begins the sentence. Where it cannot be made nothing is claimed.
    """
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise MoefyError(f"{taken}; wait for it, or choose another output.") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(lock)
        with suppress(OSError):
            folder.rmdir()
