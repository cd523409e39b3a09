"""Tables of strings, as text and as HTML; the first row is the head."""

import html
from collections.abc import Mapping, Sequence


def as_text(rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Columns of equal width, a line under the head; `right` is where the texts are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = str.rjust if right else str.ljust
    lines = ["  ".join(map(align, row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def as_html(rows: Sequence[Sequence[str]], facts: Mapping[str, str]) -> str:
    """For a notebook, with a list of facts below."""
    head, *body = rows
    table = _row("th", head) + "".join(_row("td", row) for row in body)
    listed = "".join(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in facts.items())
    return f"<table>{table}</table><ul>{listed}</ul>"


def _row(tag: str, row: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"
