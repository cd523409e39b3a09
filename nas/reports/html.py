"""HTML of a run and of a candidate, for notebooks and as a page of its own.

Pages need nothing from elsewhere: pictures are inside, and there are no scripts.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpipe_jax.utils import graph_drawing
from gpipe_jax.utils.figures import to_png
from nas.reports import lineage as drawing
from nas.reports import plots, tables
from nas.reports.report import Report, report
from nas.spaces import pictures
from nas.storage.reader import CandidateRow, Reader

MARK = "<!-- nas report -->"  # by which a page of ours is known
STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.85em; }
th, td { padding: 0.25em 0.8em; border-bottom: 1px solid #ddd; vertical-align: top; }
caption { font-weight: bold; padding: 0.3em 0; }
img { max-width: 100%; }
figure { margin: 1em; max-width: 30em; } figcaption { font-size: 0.85em; }
.row { display: flex; flex-wrap: wrap; align-items: flex-start; }
"""


def write(reader: Reader, path: Path) -> None:
    """The page of a run; FileExistsError if `path` is there and is no such page."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it")
    if path.exists() and not _is_ours(path):
        raise FileExistsError(
            f"{path}: already exists and is not a report of a search; choose another name"
        )
    path.write_text(page(reader), encoding="utf-8")


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(200)


def page(reader: Reader) -> str:
    """Numbers, plots, and the best candidate with its ancestors."""
    found = report(reader)
    name = html.escape(found.study.name)
    parts = [_facts(found), *map(tables.as_html, found.tables())]
    if found.counts.proposed:
        picture = base64.b64encode(to_png(plots.overview(reader))).decode()
        parts.append(f'<h2>Plots</h2><img alt="plots" src="data:image/png;base64,{picture}">')
    if found.best:
        best = found.best[0]
        parts.append(f"<h2>The best candidate, #{best.id}</h2>{_cells(reader, best)}")
        parts.append(f"<h2>Its ancestors</h2>{lineage(reader, best.id)}")
    return (
        f'<!DOCTYPE html>\n{MARK}\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{name}</title><style>{STYLE}</style></head>"
        f"<body><h1>{name}</h1>{''.join(parts)}</body></html>\n"
    )


def result(reader: Reader) -> str:
    """A run in a notebook: numbers, the best candidates, and a drawing of the best."""
    found = report(reader)
    shown = found._replace(best=found.best[:5], fronts={})
    parts = [f"<b>search {html.escape(found.study.name)}</b>", _facts(shown)]
    parts += map(tables.as_html, shown.tables())
    if found.best:
        parts.append(_cells(reader, found.best[0]))
    return "".join(parts)


def candidate(reader: Reader, row: CandidateRow) -> str:
    """A candidate in a notebook: its numbers, and a drawing, marked where it differs from its
    parent."""
    facts: dict[str, Any] = {"fitness": row.fitness, **row.metrics, "state": row.state}
    facts["parent"] = "none, it is random" if row.parent is None else f"#{row.parent}"
    if row.mutation:
        facts["mutation"] = row.mutation
    if row.answered_by is not None:
        facts["evaluated as"] = f"#{row.answered_by}, the same network"
    before = None
    if row.parent is not None:
        before = pictures.read(reader.study().space, reader.candidate(row.parent).architecture)
    one = pictures.read(reader.study().space, row.architecture)
    return f"<b>candidate {row.id}</b>{tables.facts_as_html(facts)}{pictures.html(one, before)}"


def lineage(reader: Reader, number: int) -> str:
    """A candidate's ancestors, the random one first, each with what differs from its parent."""
    steps = drawing.steps(reader, number)
    shown, note = drawing.drawn(steps)
    figures = "".join(
        f"<figure><figcaption><b>{html.escape(drawing.heading(step.row))}</b><br>"
        f"{'<br>'.join(map(html.escape, step.lines))}</figcaption>{_pictures(step.drawn)}</figure>"
        for step in shown
    )
    return f'<p>{len(steps)} generations{note}.</p><div class="row">{figures}</div>'


def _pictures(drawn: Sequence[graph_drawing.Picture]) -> str:
    return "".join(graph_drawing.svg(graph_drawing.without_title(one)) for one in drawn)


def _facts(found: Report) -> str:
    return tables.facts_as_html(found.facts())


def _cells(reader: Reader, row: CandidateRow) -> str:
    return pictures.html(pictures.read(reader.study().space, row.architecture))
