"""What was meant by a name that is not known."""

import difflib
import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any


def nearest(given: Any, names: Collection[str]) -> str | None:
    """The name most like a given text, if one is."""
    if not isinstance(given, str):
        return None
    # Cut, because the comparison takes quadratic time.
    return next(iter(difflib.get_close_matches(given[:80], list(names), n=1)), None)


def did_you_mean(given: Any, names: Collection[str]) -> str:
    """The end of a message: a question if something legal is close, or else nothing."""
    near = nearest(given, names)
    return f"; did you mean {near!r}?" if near else ""


def meant_or_known(given: Any, names: Collection[str]) -> str:
    """The end of a message: a question if something legal is close, or else all that is."""
    return did_you_mean(given, names) or f"; known: {', '.join(names)}"


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


GIB = 2**30


def nearest_multiples(n: int, m: int) -> tuple[int, ...]:
    """The multiples of `m` next to `n`: the one below, unless that is zero, and the one above.

    >>> nearest_multiples(60, 16), nearest_multiples(5, 16)
    ((48, 64), (16,))
    """
    below = n // m * m
    return (below, below + m) if below else (m,)


def batch_problem(batch_size: int, *, data: int, micro_batches: int) -> str | None:
    """What is wrong with a batch that cannot be cut into equal micro-batches; None if it can."""
    unit = data * micro_batches
    if batch_size % unit == 0:
        return None
    legal = ", ".join(map(str, nearest_multiples(batch_size, unit)))
    return (
        f"batch_size {batch_size} is not a multiple of data x micro_batches = "
        f"{data} x {micro_batches} = {unit}; nearest legal values: {legal}"
    )
