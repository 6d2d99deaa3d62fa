"""Pieces of the page; all text from files goes through `text` here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from lora_lightning.errors import printable


def text(value: object) -> str:
    """Any value as text of the page: nothing in it is markup, what is unseen is spelled out."""
    return escape(printable(str(value)))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """A table whose first cells are names, its last `numbers` columns numbers.

    With more than three columns its rows become blocks on a narrow screen. Cells are plain text.
    """
    plain = len(header) - numbers
    heads = "".join(
        f'<th scope="col"{_right(place >= plain)}>{text(cell)}</th>'
        for place, cell in enumerate(header)
    )
    body = []
    for name, *cells in rows:
        line = f'<th scope="row">{text(name)}</th>'
        for place, cell in enumerate(cells, 1):
            of = f' data-of="{text(header[place])}"'
            line += f"<td{_right(place >= plain)}{of}>{text(cell)}</td>"
        body.append(f"<tr>{line}</tr>")
    kind = ' class="stack wide"' if len(header) > 3 else ""
    return f"<table{kind}><thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def details(summary: str, content: str) -> str:
    """Content that is folded at first."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>"


def section(kind: str, finding: str, *content: str) -> str:
    """A part of the page under the sentence that it shows."""
    inside = "\n".join(filter(None, content))
    if finding.startswith(("the ", "no ", "none ")):  # else a name, which stays as it is
        finding = finding[:1].upper() + finding[1:]
    return f'<section><p class="kind">{text(kind)}</p><h2>{text(finding)}</h2>\n{inside}</section>'


def tiles(entries: Iterable[tuple[str, str, str]]) -> str:
    """Single numbers: what it is, the number, what to know of it."""
    inside = "".join(
        f"<div><dt>{text(name)}</dt><dd><b>{text(value)}</b><span>{text(note)}</span></dd></div>"
        for name, value, note in entries
    )
    return f'<dl class="tiles">{inside}</dl>' if inside else ""


def note(sentence: str) -> str:
    """A remark in small print."""
    return f'<p class="note">{text(sentence)}</p>'


def _right(number: bool) -> str:
    return ' class="n"' if number else ""
