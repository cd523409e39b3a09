"""Show a run or a candidate as HTML, for notebooks and as a page of its own.

A page needs no other file: pictures are embedded, and there are no scripts.
"""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpipe_jax.utils import graph_drawing
from gpipe_jax.utils.figures import to_png
from nas.reports import lineage as lineages
from nas.reports import plots, tables
from nas.reports.report import Report, report
from nas.spaces import pictures
from nas.spaces.space import Space
from nas.storage.reader import CandidateRow, Reader

MARK = "<!-- nas report -->"  # identifies a page that may be replaced
STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.85em; }
th, td { padding: 0.25em 0.8em; border-bottom: 1px solid #ddd; vertical-align: top; }
caption { font-weight: bold; padding: 0.3em 0; }
img { max-width: 100%; }
figure { margin: 1em; max-width: 30em; } figcaption { font-size: 0.85em; }
.row { display: flex; flex-wrap: wrap; align-items: flex-start; }
"""


def write(text: str, path: Path) -> None:
    """Write the text of a `page` to a file.

    Raises:
        FileExistsError: Another file of this name exists; an earlier page is replaced.
        FileNotFoundError: The folder does not exist.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it")
    if path.exists() and not _is_page(path):
        raise FileExistsError(
            f"{path}: already exists and is not a report of a search; choose another name"
        )
    # A name may hold what UTF-8 has not: half of a surrogate pair.
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK.encode() in file.read(200)


def page(reader: Reader, space: Space[Any] | None = None) -> str:
    """Return a page with the numbers, the plots, and the best candidate with its ancestors.

    Here and below, `space` is the search space, if it is known.
    """
    summary = report(reader)
    name = html.escape(summary.study.name)
    sections = [_facts(summary), *map(tables.as_html, summary.tables())]
    if summary.counts.proposed:
        image = base64.b64encode(to_png(plots.overview(reader))).decode()
        sections.append(f'<h2>Plots</h2><img alt="plots" src="data:image/png;base64,{image}">')
    if summary.best:
        best = summary.best[0]
        sections.append(f"<h2>The best candidate, #{best.id}</h2>{_cells(reader, best, space)}")
        sections.append(f"<h2>Its ancestors</h2>{lineage(reader, best.id, space)}")
    return (
        f'<!DOCTYPE html>\n{MARK}\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{name}</title><style>{STYLE}</style></head>"
        f"<body><h1>{name}</h1>{''.join(sections)}</body></html>\n"
    )


def result(reader: Reader, space: Space[Any] | None = None) -> str:
    """Return a run for a notebook: numbers, the best candidates, and a drawing of the best."""
    summary = report(reader)
    short = summary._replace(best=summary.best[:5], fronts={})
    sections = [f"<b>search {html.escape(summary.study.name)}</b>", _facts(short)]
    sections += map(tables.as_html, short.tables())
    if summary.best:
        sections.append(_cells(reader, summary.best[0], space))
    return "".join(sections)


def candidate(reader: Reader, row: CandidateRow, space: Space[Any] | None = None) -> str:
    """Return a candidate for a notebook: numbers, and a drawing with its changes marked."""
    facts: dict[str, Any] = {"fitness": row.fitness, "state": row.state}
    facts["parent"] = "none, it is random" if row.parent is None else f"#{row.parent}"
    if row.mutation:
        facts["mutation"] = row.mutation
    if row.answered_by is not None:
        facts["evaluated as"] = f"#{row.answered_by}, the same network"
    name, parent = reader.study().space, None
    if row.parent is not None:
        parent = pictures.read(name, reader.candidate(row.parent).architecture, space)
    drawing = pictures.html(pictures.read(name, row.architecture, space), parent)
    shown = tables.with_metrics(facts, row.metrics)
    return f"<b>candidate {row.id}</b>{tables.facts_as_html(shown)}{drawing}"


def lineage(reader: Reader, number: int, space: Space[Any] | None = None) -> str:
    """Return a candidate's ancestors, the random one first, each with its differences."""
    steps = lineages.steps(reader, number, space)
    shown, note = lineages.shortened(steps)
    figures = "".join(map(_ancestor, shown))
    return f'<p>{len(steps)} generations{note}.</p><div class="row">{figures}</div>'


def _ancestor(step: lineages.Step) -> str:
    caption = f"<b>{html.escape(lineages.heading(step.row))}</b><br>"
    caption += "<br>".join(map(html.escape, step.lines))
    return f"<figure><figcaption>{caption}</figcaption>{_svgs(step.pictures)}</figure>"


def _svgs(pictures: Sequence[graph_drawing.Picture]) -> str:
    return "".join(graph_drawing.svg(graph_drawing.without_title(picture)) for picture in pictures)


def _facts(summary: Report) -> str:
    return tables.facts_as_html(summary.facts())


def _cells(reader: Reader, row: CandidateRow, space: Space[Any] | None) -> str:
    return pictures.html(pictures.read(reader.study().space, row.architecture, space))
