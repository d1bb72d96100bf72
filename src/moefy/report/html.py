"""Pages that load nothing: style, tables and pictures in one HTML file. What is given as HTML is escaped already."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from moefy.checkpoint import why_not_written
from moefy.errors import MoefyError
from moefy.files import put_in_place

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #555; font-size: 0.9rem; }
table { border-collapse: collapse; font-size: 0.9rem; } .wide { overflow-x: auto; }
th, td { padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, .text th, .text td, .named :nth-child(2) { text-align: left; }
code { background: #f2f2f2; padding: 0 0.2em; white-space: pre-wrap; } summary { cursor: pointer; margin: 0.4rem 0; }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page with a title (plain text) and a body of HTML parts."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Cells are HTML already: what is not a number is escaped where the cell is made.

    Numbers are aligned to the right; `kind` is "text" for a table of words, "named" for words in the second column.
    """
    cells = "".join(f"<th>{h}</th>" for h in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{cells}</tr>{body}</table></div>'


def image(png: bytes, caption: str) -> str:
    """A picture with its caption (plain text)."""
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def write_whole(path: Path, text: str) -> Path:
    """Write a file beside its place first, then rename it: it is whole or what it was before."""
    write_together({path: text})
    return path


def write_together(texts: Mapping[Path, str]) -> None:
    """Write files beside their places first, then rename them. MoefyError if that fails; nothing is left then."""
    partials = {path: path.with_name(f".{path.name}.partial-{os.getpid()}") for path in texts}
    try:
        for path, partial in partials.items():
            partial.write_text(texts[path], encoding="utf-8", errors="backslashreplace")  # names may be no text
        for path, partial in partials.items():
            put_in_place(partial, path)
    except OSError as error:
        raise MoefyError(why_not_written(error, path)) from None
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()
