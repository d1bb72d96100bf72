"""Task data as rows: local .tsv, .csv, .jsonl, .json and .txt files (plain or .gz) and hub data sets."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError
from moefy.sources.texts import decoded, hub_rows, is_text

Row = dict[str, Any]
FORMATS = (".tsv", ".csv", ".jsonl", ".json", ".txt")


class PlacedRow(dict[str, Any]):
    """A row that knows where it stands, as the start of a sentence: "Line 3 of dev.tsv"."""

    def __init__(self, fields: Row, place: str) -> None:
        super().__init__(fields)
        self.place = place


def place_of(row: Row, number: int) -> str:
    """Where a row stands, by its own knowledge or by its number, counted from 0."""
    return row.place if isinstance(row, PlacedRow) else f"Row {number + 1}"


def read_rows(sources: str | Path | Sequence[str | Path]) -> list[Row]:
    """The rows of one or several sources, each a dictionary by column name.

    .tsv is read with quoting off. .json may be a list of objects, {"data": [...]} or one passage of RACE. Every
    line of .txt is a row with the one column "line", but such a file may hold JSON, as RACE's do.
    `hf:NAME[/CONFIG][:SPLIT]` is a hub data set (needs `datasets`).
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
        missing = next(place_of(row, i) for i, row in enumerate(rows) if partly[0] not in row)
        raise MoefyError(f"{missing} lacks the column {partly[0]}, which the task {task} needs in every row.")
    raise MoefyError(f"The task {task} needs a column {wanted}; the data has {', '.join(map(str, rows[0]))}.")


def text_of(row: Row, column: str, place: str) -> str:
    """A field that must hold text (or a number, as text); MoefyError names the row's place if not."""
    value = row[column]
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        return str(value)
    held = "nothing" if value is None or value != value else f"a {type(value).__name__}"
    raise MoefyError(f"{place} has {held} in {column!r}, where there must be text; mend or remove it.")


def label_text(value: Any) -> str:
    """A label as its text: stripped, and whole numbers without the ".0" that tables make of them."""
    text = str(value).strip()
    return text.partition(".")[0] if re.fullmatch(r"[0-9]+\.0+", text) else text


def _read(source: str) -> list[Row]:
    if source.startswith("hf:"):
        return list(hub_rows(source[3:]))
    path = Path(source).expanduser()
    if not path.is_file():
        raise MoefyError(f"There is no data file {source!r}; name a file or a hub data set (hf:NAME).")
    kind = next((s for s in reversed(path.suffixes) if s in FORMATS), None)
    if kind is None:
        raise MoefyError(f"{path} has none of the endings {', '.join(FORMATS)} (or one of them with .gz).")
    text = decoded(path, "data").replace("\r\n", "\n")
    if not text.strip():
        raise MoefyError(f"The data file {path} is empty; give one with some rows.")
    if kind in (".tsv", ".csv"):
        return _table(text, path, tabs=kind == ".tsv")
    if kind == ".txt" and not text.lstrip().startswith("{"):  # RACE's .txt files hold JSON
        return [PlacedRow({"line": line}, place) for place, line in _lines(text, path)]
    return _json(text, path, lines=kind == ".jsonl" or (kind == ".txt" and "\n{" in text.strip()))


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    """The lines that hold something, each with its place."""
    return ((f"Line {i} of {path}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip())


def _table(text: str, path: Path, tabs: bool) -> list[Row]:
    records = _tab_separated(text) if tabs else _comma_separated(text, path)
    _, header = next(records, (1, []))
    rows: list[Row] = []
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice is not None:
        raise MoefyError(f"{path} has two columns {twice!r}; rename one of them.")
    for number, fields in records:
        place = f"Line {number} of {path}"
        if len(fields) != len(header):
            raise MoefyError(f"{place} has {len(fields)} fields, and its header has {len(header)}.")
        rows.append(PlacedRow(dict(zip(header, fields, strict=True)), place))
    return rows


def _tab_separated(text: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of each line that is not empty, with its number."""
    # GLUE's files have stray quotation marks and no quoting; str.splitlines would also cut at U+0085 and the like.
    lines = text.split("\n") if "\n" in text else text.split("\r")
    return ((number, line.split("\t")) for number, line in enumerate(lines, 1) if line)


def _comma_separated(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The fields of each record that is not empty, with the number of its first line."""
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    usual = csv.field_size_limit(len(text) + 1)
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise MoefyError(f"{path} is not valid CSV ({error}); see whether a quotation mark is left open.") from None
    finally:
        csv.field_size_limit(usual)


def _json(text: str, path: Path, lines: bool) -> list[Row]:
    data = {place: _parsed(line, place) for place, line in _lines(text, path)} if lines else _parsed(text, str(path))
    if not lines:
        if isinstance(data, dict):  # a file of RACE is one passage
            data = [data] if "article" in data else data.get("data")
        data = {f"Row {i} of {path}": row for i, row in enumerate(data, 1)} if isinstance(data, list) else {"": None}
    if not all(isinstance(row, dict) for row in data.values()):
        raise MoefyError(f'{path} must hold objects: one a line, a list of them, or {{"data": [...]}}.')
    halves = re.search(r"\\u[dD][89a-fA-F]", text)  # without, no JSON has half a character
    for place, row in data.items() if halves else ():
        if not is_text(json.dumps(row, ensure_ascii=False)):
            raise MoefyError(f"{place} holds half a character (\\ud800 to \\udfff); mend or remove it.")
    return [PlacedRow(row, place) for place, row in data.items()]


def _parsed(text: str, place: str) -> Any:
    """What JSON says; MoefyError, which names the place, if it is none or cannot be read."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, " if "\n" in text else ""
        raise MoefyError(f"{place} is not valid JSON ({error.msg}: {at}character {error.colno}); mend it.") from None
    except ValueError:  # Python's limit on the digits of a number
        raise MoefyError(f"{place} holds a number of thousands of digits; mend or remove it.") from None
    except RecursionError:
        raise MoefyError(f"{place} nests its JSON too deeply to be rows of a task.") from None
