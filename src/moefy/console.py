"""What the command line prints: progress with an estimate, tables, one sentence for a mistake."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# What is printed holds paths and names, in which "[/b]" and ":x:" are no markup.
out = Console(markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar with an estimate on standard error; yields `update(done, total)`."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bar:
        task = bar.add_task(what, total=total)

        def update(done: int, of: int | None = None, *_: object) -> None:
            bar.update(task, completed=done, total=of)

        yield update


@contextmanager
def status(what: str) -> Iterator[None]:
    """Say what is being done while it takes an unknown time."""
    with err.status(Text(what)):
        yield


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    shown = Table(title=title, title_justify="left", show_header=any(header))
    for i, name in enumerate(header):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        shown.add_row(*row)
    out.print(shown)
