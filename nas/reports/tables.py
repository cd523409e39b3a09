"""Format tables as plain text and as HTML, which escapes all values."""

import html
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from gpipe_jax.utils.text import text_table as columns


class SearchTable(NamedTuple):
    """Hold a title, the names of the columns, and rows with a value for each column."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


def as_text(table: SearchTable) -> str:
    """Return the table as text in columns."""
    rows = [[show(value) for value in row] for row in (table.header, *table.rows)]
    return f"{show(table.title)}\n{columns(rows)}"


def as_html(table: SearchTable) -> str:
    """Return the table as HTML, with its title as the caption."""
    head = _row("th", table.header)
    body = "".join(_row("td", [show(value) for value in row]) for row in table.rows)
    title = html.escape(table.title)
    return f'<table><caption style="text-align:left">{title}</caption>{head}{body}</table>'


def facts_as_html(facts: Mapping[str, Any]) -> str:
    """Return a table with one name and its value in each row."""
    rows = "".join(
        f'<tr><th style="text-align:left">{html.escape(name)}</th>'
        f'<td style="text-align:left">{html.escape(show(value))}</td></tr>'
        for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def _row(tag: str, values: Iterable[str]) -> str:
    cells = (
        f'<{tag} style="text-align:left">{html.escape(str(value))}</{tag}>' for value in values
    )
    return f"<tr>{''.join(cells)}</tr>"


def metric_labels(names: Iterable[str], taken: Collection[str]) -> dict[str, str]:
    """Return a label for each metric: its name, or `metric NAME` where that name is taken.

    >>> metric_labels(["params_m", "state"], ["state"])
    {'params_m': 'params_m', 'state': 'metric state'}
    """
    return {name: f"metric {name}" if name in taken else name for name in names}


def with_metrics(facts: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return facts followed by metrics; no metric hides a fact, nor a fact a metric."""
    labels = metric_labels(metrics, facts)
    return {**facts, **{labels[name]: value for name, value in metrics.items()}}


def finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Replace infinity and NaN, which JSON does not have, by None."""
    return {name: finite_or_none(value) for name, value in metrics.items()}


def finite_or_none(value: float | None) -> float | None:
    """Return a number that JSON has, and None otherwise."""
    return value if value is not None and math.isfinite(value) else None


def show(value: Any) -> str:
    """Format a value on one line."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(value).split())
