"""notebook: objects as Jupyter shows them. Tables without colours of their own, which serve light and dark themes."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_TABLE = '<table style="border-collapse: collapse; font-size: 0.9em; margin: 0.3em 0">'
_CELL = 'style="text-align: {align}; padding: 2px 8px; vertical-align: top"'


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[int] = ()) -> str:
    """An HTML table; whatever is in a cell is escaped.

    Args:
        right: the columns that are aligned to the right.
    """
    cells = [_CELL.format(align="right" if i in right else "left") for i in range(len(headings))]
    head = "".join(f"<th {c}>{escaped(h)}</th>" for c, h in zip(cells, headings, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td {c}>{escaped(x)}</td>" for c, x in zip(cells, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"{_TABLE}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def titled(title: str, *parts: str) -> str:
    """Parts of HTML under a line of text."""
    return f"<div><p><b>{escaped(title)}</b></p>{''.join(parts)}</div>"


def folded(title: str, content: str) -> str:
    """HTML that is shown when its title is clicked."""
    return f"<details><summary>{escaped(title)}</summary>{content}</details>"


def line(text: str) -> str:
    """A line of text."""
    return f"<p>{escaped(text)}</p>"


def preformatted(text: str) -> str:
    """Lines whose columns are aligned by spaces."""
    return f'<pre style="background: none; color: inherit">{escaped(text)}</pre>'


def escaped(x: object) -> str:
    """Text as it stands in HTML."""
    return html.escape("" if x is None else str(x))
