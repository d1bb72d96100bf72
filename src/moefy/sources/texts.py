"""Text in: files (plain, .gz, .jsonl), hub data sets, literal text, and the text that ships with Python."""

from __future__ import annotations

import gzip
import json
import os
import pydoc_data.topics
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError, MoefyWarning
from moefy.sources import hub

BUILTIN = "pydoc"
# Of a hub's data set, which may be larger than any disk: some 16 million tokens.
HUB_CHARACTERS = 1 << 26


def read_text(source: str | os.PathLike[str]) -> str:
    """The text that `source` names.

    A path of a text file (UTF-8, plain or .gz; of a .jsonl file the "text" fields, one document a line);
    `hf:NAME[/CONFIG][:SPLIT]`, a hub data set with a "text" column (needs the `datasets` package);
    `pydoc`, the 465 kB of English documentation in every CPython; or, if it has blanks, the text itself.
    """
    name = os.fspath(source)
    if name == BUILTIN:
        return builtin_text()
    if name.startswith("hf:"):
        return _hub_text(name[3:])
    try:
        path = Path(name).expanduser()
        exists = path.is_file() or path.is_fifo()
    except (OSError, RuntimeError, ValueError):  # a literal text may be no legal file name
        exists = False
    if exists:
        return _file_text(path)
    if " " in name.strip() and len(name) > 200:
        if not is_text(name):
            raise MoefyError("The text is no valid text (it is not UTF-8, or holds half a character); give UTF-8.")
        return name
    raise MoefyError(f"There is no text file {name!r}; name a file, a data set (hf:NAME), or {BUILTIN!r}.")


def builtin_text() -> str:
    """CPython's documentation topics: real English text that needs no download (about 115,000 tokens)."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[key] for key in sorted(topics))


def halves(text: str) -> tuple[str, str]:
    """The two halves of a text, cut at a paragraph: one to calibrate on, one to measure on."""
    cut = text.find("\n\n", len(text) // 2)
    cut = len(text) // 2 if cut < 0 else cut
    return text[:cut], text[cut:]


def is_text(text: str) -> bool:
    """Whether a text is one: half a surrogate pair, as in JSON's "\\ud800", has no UTF-8, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def decoded(path: Path, kind: str = "text") -> str:
    """What a file of text says, plain or in gzip; MoefyError if it cannot be read or holds none. `kind` names it."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise MoefyError(f"The {kind} file {path} cannot be read ({error}); check that it is whole.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise MoefyError(f"{path} is not a text file (it is not valid UTF-8); give one that is, plain or in gzip.")
    return text


def _file_text(path: Path) -> str:
    text = decoded(path)
    kinds = {suffix.lower() for suffix in path.suffixes}
    if kinds & {".jsonl", ".ndjson"}:
        text = _documents(text, path)
    elif ".json" in kinds:
        raise MoefyError(f'{path} is JSON and no text; give JSON lines (.jsonl) with a "text" field in each, or text.')
    if not text.strip():
        raise MoefyError(f"The text file {path} is empty; give one with some text in it.")
    return text


def _documents(lines: str, path: Path) -> str:
    documents = []
    for number, line in enumerate(lines.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            text = None
        if not isinstance(text, str):
            raise MoefyError(f'{path} is not JSON lines with a "text" field in each; mend or remove line {number}.')
        if not is_text(text):
            raise MoefyError(f"Line {number} of {path} holds half a character (\\ud800 to \\udfff); mend or remove it.")
        documents.append(text)
    return "\n\n".join(documents)


def _hub_text(name: str) -> str:
    texts: list[str] = []
    held = 0
    for row in hub_rows(name, streamed=True):
        if "text" not in row:
            raise MoefyError(f'The data set {name!r} has no "text" column.')
        if isinstance(row["text"], str) and row["text"].strip():
            texts.append(row["text"])
            held += len(row["text"])
        if held >= HUB_CHARACTERS:
            warnings.warn(f"The data set {name!r} is read to its character {held:,}.", MoefyWarning, stacklevel=2)
            break
    if not texts:
        raise MoefyError(f"The data set {name!r} has no text in it; choose another, or another split.")
    return "\n\n".join(texts)


def hub_rows(name: str, streamed: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a hub data set NAME[/CONFIG][:SPLIT] (needs the `datasets` package).

    `streamed`, what is not asked for is not downloaded either; where the hub is out of reach rows come from the cache.
    """
    try:
        import datasets
    except ImportError:
        raise MoefyError("Reading a hub data set needs the datasets package: pip install datasets.") from None
    path, _, split = name.partition(":")
    if not path.strip("/"):
        raise MoefyError("hf: needs the name of a data set, such as hf:NAME or hf:OWNER/NAME:SPLIT.")
    owner_and_name, config = (path, None) if path.count("/") < 2 else path.rsplit("/", 1)
    failure = None if Path(owner_and_name).exists() else hub.failure(owner_and_name, "dataset")
    try:
        with hub.quiet(cached_only=failure is not None):
            whole = not streamed or failure is not None or Path(owner_and_name).exists()
            options = {} if whole else {"streaming": True}
            for row in datasets.load_dataset(owner_and_name, config, split=split or "train", **options):
                yield dict(row)
    except Exception as error:
        said = str(error if failure is None else failure).strip().splitlines() or [type(error).__name__]
        if failure is None:
            raise MoefyError(f"The data set {name!r} cannot be read: {said[0].rstrip('.')}.") from None
        raise MoefyError(
            f"The hub does not give the data set {name!r} ({said[0].rstrip('.')}), and it is not in the cache; "
            f"correct the name, name a file, or see to the network."
        ) from None
