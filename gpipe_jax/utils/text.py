"""Format text for people: suggestions, tables, sizes, times; word rules that packages share."""

import difflib
import html
from collections.abc import Collection, Mapping, Sequence
from typing import Any

KIB, MIB, GIB = 2**10, 2**20, 2**30

# --- suggestions ----------------------------------------------------------------------------------


def nearest_name(given: Any, names: Collection[str]) -> str | None:
    """Return the name that is most like the given text, or None if no name is close.

    The order of the words does not count if no name is close in its own.

    >>> nearest_name("1f1b_eager", ["1f1b", "eager_1f1b"])
    'eager_1f1b'
    """
    if not isinstance(given, str):
        return None
    given = given[:80]  # because the comparison takes quadratic time
    sorted_words = {_sort_words(name): name for name in names}
    if _sort_words(given) in sorted_words:
        return sorted_words[_sort_words(given)]
    near = difflib.get_close_matches(given, list(names), n=1)
    if near:
        return near[0]
    near = difflib.get_close_matches(_sort_words(given), list(sorted_words), n=1)
    return sorted_words[near[0]] if near else None


def _sort_words(name: str) -> str:
    return "_".join(sorted(name.split("_")))


def did_you_mean(given: Any, names: Collection[str]) -> str:
    """Return the end of a message: a question if a legal name is close, or else nothing."""
    near = nearest_name(given, names)
    return f"; did you mean {near!r}?" if near else ""


def did_you_mean_or_list(given: Any, names: Collection[str]) -> str:
    """Return the end of a message: a question if a legal name is close, or else all names."""
    return did_you_mean(given, names) or f"; known: {', '.join(names)}"


# --- packages -------------------------------------------------------------------------------------


def install_advice(extra: str) -> str:
    """Word how to install the optional packages of an extra, from a clone too.

    >>> install_advice("examples")
    "run pip install 'gpipe-jax[examples]' (in a clone: pip install -e '.[examples]')"
    """
    return f"run pip install 'gpipe-jax[{extra}]' (in a clone: pip install -e '.[{extra}]')"


# --- sizes, times and numbers ---------------------------------------------------------------------


def format_bytes(size: float) -> str:
    """Format a size in bytes with the largest unit that leaves at least one.

    >>> format_bytes(1023), format_bytes(2048), format_bytes(2**31)
    ('1023 B', '2.0 KiB', '2.00 GiB')
    """
    if size < KIB:
        return f"{size:.0f} B"
    if size < MIB:
        return f"{size / KIB:.1f} KiB"
    if size < GIB:
        return f"{size / MIB:.1f} MiB"
    return f"{size / GIB:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """Format a time in milliseconds, or in seconds from one second on.

    >>> format_seconds(0.0123), format_seconds(4.5)
    ('12.3 ms', '4.5 s')
    """
    return f"{1000 * seconds:,.3g} ms" if seconds < 1 else f"{seconds:,.3g} s"


def format_value(value: Any) -> str:
    """Format a figure of a table: a float with four significant digits, anything else by `str`."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- tables ---------------------------------------------------------------------------------------


def figures_table(figures: Mapping[str, Any]) -> str:
    """Write figures as a table of names and values, one per line; leave out what is None."""
    rows = [(name, format_value(value)) for name, value in figures.items() if value is not None]
    return text_table(rows, head=False)


def text_table(
    rows: Sequence[Sequence[str]], *, align_right: bool = False, head: bool = True
) -> str:
    """Lay out rows in columns of equal width, with a line under the head (the first row)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = str.rjust if align_right else str.ljust
    lines = ["  ".join(map(align, row, widths)).rstrip() for row in rows]
    if head:
        lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def html_table(rows: Sequence[Sequence[str]], facts: Mapping[str, str]) -> str:
    """Write rows (the first is the head) as HTML for a notebook, and a list of facts below."""
    head, *body = rows
    table = _html_row("th", head) + "".join(_html_row("td", row) for row in body)
    listed = "".join(f"<li>{html.escape(f'{k}: {v}')}</li>" for k, v in facts.items())
    return f"<table>{table}</table><ul>{listed}</ul>"


def _html_row(tag: str, row: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in row)}</tr>"


# --- batch sizes ----------------------------------------------------------------------------------


def nearest_multiples(n: int, m: int) -> tuple[int, ...]:
    """Return the multiples of `m` next to `n`: the one below, unless it is zero, and the one above.

    >>> nearest_multiples(60, 16), nearest_multiples(5, 16)
    ((48, 64), (16,))
    """
    below = n // m * m
    return (below, below + m) if below else (m,)


def batch_problem(batch_size: int, *, replicas: int, micro_batches: int) -> str | None:
    """Explain why a batch cannot be cut into equal micro-batches; return None if it can."""
    unit = replicas * micro_batches
    if batch_size % unit == 0:
        return None
    legal = ", ".join(map(str, nearest_multiples(batch_size, unit)))
    return (
        f"batch_size {batch_size} is not a multiple of data x micro_batches = "
        f"{replicas} x {micro_batches} = {unit}; nearest legal values: {legal}"
    )
