"""What the command line prints: progress with an estimate, tables, one sentence for a mistake."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress

from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# What is printed holds paths and names, in which "[/b]" and ":x:" are no markup.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)
_WIDEST = 1000  # columns of a table in a file
# Seconds between lines of progress in a log, and those after which it is said what is being done.
EVERY = 30.0
SOON = 1.0


@contextmanager
def progress(
    what: str, total: int | None = None, counted: bool = True, brief: bool = False
) -> Iterator[Callable[..., None]]:
    """Progress with an estimate on standard error, a bar or lines for a log; yields `update(done, total)`.

    An update's `label=` says what is being done where that is not `what`. What is done is shown as a count, or as a
    percentage where it is work that is not `counted`. Work that is likely to be `brief` leaves nothing behind, and one
    line in a log.
    """
    if not err.is_terminal:
        with _said_soon(what) if brief else nullcontext(), _progress_lines(what, total, counted, brief) as update_lines:
            yield update_lines
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn() if counted else TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=brief) as bar:
        task = bar.add_task(what, total=total)

        def update(done: int, of: int | None = None, *_: object, label: str = what) -> None:
            bar.update(task, completed=done, total=of, description=label)

        yield update


@contextmanager
def _progress_lines(what: str, total: int | None, counted: bool, brief: bool) -> Iterator[Callable[..., None]]:
    """A line every EVERY seconds, for logs, and one at the end of what is not brief."""
    start = said = time.monotonic()
    last, shown_last = (what, 0, total), False

    def line(label: str, done: int, of: int | None, seconds: float) -> str:
        if not of and not done:  # nobody has counted yet
            return f"{label}: {_clock(seconds)}"
        left = f", about {_clock(seconds / done * (of - done))} left" if of and 0 < done < of else ""
        shown = f"{done}{f' of {of}' if of else ''}" if counted or not of else f"{done / of:.0%}"
        return f"{label}: {shown}, {_clock(seconds)}{left}"

    def update(done: int, of: int | None = None, *_: object, label: str = what) -> None:
        nonlocal said, last, shown_last
        last, now = (label, done, of or last[2]), time.monotonic()
        shown_last = now - said >= EVERY
        if shown_last:
            said = now
            _log(line(*last, now - start))

    yield update
    if not shown_last and not brief:
        _log(line(*last, time.monotonic() - start))


def _log(what: str) -> None:
    """A line for a log; a full disk under it shall not end the work."""
    with suppress(OSError):
        err.print(what, soft_wrap=True)


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


@contextmanager
def status(what: str) -> Iterator[None]:
    """Say what is being done while it takes an unknown time."""
    with err.status(Text(what)) if err.is_terminal else _said_soon(what):
        yield


@contextmanager
def _said_soon(what: str) -> Iterator[None]:
    """A line for a log, unless it is done, or refused, before anybody could wonder."""
    timer = threading.Timer(SOON, _log, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    shown = Table(title=title, title_justify="left", show_header=any(header))
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    if out.is_terminal:
        out.print(shown)
        return
    # Nobody can widen a file or a pipe to read what was cut off there.
    before, wanted = out.width, Measurement.get(out, out.options.update(width=_WIDEST), shown).maximum
    out.width = max(before, wanted)
    out.print(shown)
    out.width = before
