"""Files that are whole or not there, also after a power cut."""

from __future__ import annotations

import os
from pathlib import Path


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
