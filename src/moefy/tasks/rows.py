"""Task data as rows: local .tsv, .csv, .jsonl, .json and .txt files (plain or .gz) and hub data sets."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moefy.texts import hub_rows
from moefy.types import MoefyError

Row = dict[str, Any]
FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".txt")


def read_rows(sources: str | Path | Sequence[str | Path]) -> list[Row]:
    """The rows of one or several sources, each a dictionary by column name.

    .tsv is read with quoting off; .json may be a list of objects or {"data": [...]}; of .txt every line
    is a row with the one column "line"; `hf:NAME[/CONFIG][:SPLIT]` is a hub data set (needs `datasets`).
    """
    listed = [sources] if isinstance(sources, (str, Path)) else list(sources)
    rows = [row for source in listed for row in _read(str(source))]
    if not rows:
        raise MoefyError(f"There are no rows in {', '.join(map(str, listed)) or 'the data'}; give a file with some.")
    return rows


def column(rows: Sequence[Row], names: Sequence[str], task: str) -> str:
    """The first of `names` that is a column of every row, or a MoefyError that lists what is there."""
    for name in names:
        if all(name in row for row in rows):
            return name
    partly = [name for name in names if any(name in row for row in rows)]
    wanted = " or ".join(names)
    if partly:
        missing = next(i for i, row in enumerate(rows) if partly[0] not in row)
        raise MoefyError(f"The task {task} needs the column {partly[0]} in every row; row {missing + 1} lacks it.")
    raise MoefyError(f"The task {task} needs a column {wanted}; the data has {', '.join(map(str, rows[0]))}.")


def _read(source: str) -> list[Row]:
    if source.startswith("hf:"):
        return hub_rows(source[3:])
    path = Path(source).expanduser()
    if not path.is_file():
        raise MoefyError(f"There is no data file {source!r}; name a file or a hub data set (hf:NAME).")
    kind = next((s for s in reversed(path.suffixes) if s in FORMATS), None)
    if kind is None:
        raise MoefyError(f"{path} has none of the endings {', '.join(FORMATS)} (or one of them with .gz).")
    text = _text(path)
    if kind in (".tsv", ".csv"):
        return list(_table(text, path, "\t" if kind == ".tsv" else ","))
    if kind == ".txt":
        return [{"line": line} for line in text.split("\n") if line.strip()]
    return _json(text, path, lines=kind == ".jsonl")


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise MoefyError(f"{path} is not a text file (it is not valid UTF-8).") from None
    except (OSError, EOFError, zlib.error) as error:
        raise MoefyError(f"The data file {path} cannot be read ({error}); check that it is whole.") from None


def _table(text: str, path: Path, delimiter: str) -> Iterator[Row]:
    # GLUE's files have stray quotation marks and no quoting; str.splitlines would also cut at U+0085 and the like.
    lines = (line for line in text.split("\n") if line)
    tabs = delimiter == "\t"
    reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    header = next(reader, [])
    for number, fields in enumerate(reader, 2):
        if len(fields) != len(header):
            raise MoefyError(f"Row {number} of {path} has {len(fields)} fields, and its header has {len(header)}.")
        yield dict(zip(header, fields, strict=True))


def _json(text: str, path: Path, lines: bool) -> list[Row]:
    try:
        data = [json.loads(line) for line in text.split("\n") if line.strip()] if lines else json.loads(text)
    except json.JSONDecodeError as error:
        raise MoefyError(f"{path} is not valid JSON{' lines' if lines else ''}: {error}.") from None
    rows = data.get("data") if isinstance(data, dict) else data
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise MoefyError(f'{path} must hold objects: one a line, a list of them, or {{"data": [...]}}.')
    return rows
