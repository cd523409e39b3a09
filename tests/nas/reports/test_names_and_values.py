"""Reports take any name of a metric and any number, and show fronts in declared directions."""

import json
import math
import warnings
from pathlib import Path

from searches import drive, ones, small

import nas
from nas.reports import html, plots, report
from nas.storage import queries

NAMES = [
    r"a$\frac{$_ms", "$x$_ms", "two\nlines_ms", "<b>_ms", "  _ms", "x" * 300 + "_ms", "ü_ms",
    "\udce9_ms",
]  # fmt: skip


def scored(folder: Path, metrics, **options) -> nas.Search:
    """Run a search whose candidates have these metrics, functions of the job."""

    def evaluate(job: nas.Job) -> dict:
        return {"fitness": ones(job.architecture), **{k: f(job) for k, f in metrics.items()}}

    return drive(small(folder, **options), evaluate)


def panel(figure, title: str):
    (axes,) = (axes for axes in figure.axes if axes.get_title().startswith(title))
    return axes


def latency(job: nas.Job) -> float:
    return (math.inf, math.nan, -math.inf, 1e308, 5.0)[job.candidate % 5]


def alternating(job: nas.Job) -> float:
    return 1.7e308 * (-1) ** job.candidate


def test_any_name_of_a_metric_and_any_number_is_drawn_and_written(tmp_path) -> None:
    """Let all values be infinite: then the titles have the names."""
    metrics = {**dict.fromkeys(NAMES, lambda job: math.inf), "l_ms": latency, "a_ms": alternating}
    with scored(tmp_path, metrics, cycles=10) as search:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")
            html.write(html.page(search.store), tmp_path / "it.html")
        figure = plots.overview(search.store)
        text = str(report.report(search.store))
    titles = [axes.get_title() for axes in figure.axes if "no candidate" in axes.get_title()]
    assert len(titles) == len(NAMES) + 1 and text.count(": 0 candidates") == len(NAMES)
    for title in titles:
        assert title.startswith("Pareto front: no candidate has a finite ") and len(title) < 90


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path) -> None:
    with scored(tmp_path, {"latency_ms": latency}) as search:
        axes = panel(plots.overview(search.store), "Pareto front")
    assert axes.get_title() == "Pareto front: 1 candidates (48 without a finite value not shown)"


def test_a_fitness_that_is_not_finite_is_left_out(tmp_path) -> None:
    def evaluate(job: nas.Job) -> dict:
        fitness = -math.inf if job.candidate % 3 else ones(job.architecture)
        return {"fitness": fitness, "latency_ms": 1.0 + job.candidate}

    with drive(small(tmp_path, cycles=30), evaluate) as search:
        figure = plots.overview(search.store, tmp_path / "it.png")
        values = report.report(search.store).to_dict()
    titles = [axes.get_title() for axes in figure.axes]
    note = "(20 without a finite value not shown)"
    assert f"best so far {note}" in titles
    assert any(title.startswith("Pareto") and title.endswith(note) for title in titles)
    assert any(title.startswith("population, 8 members (") for title in titles)
    assert json.dumps(values, allow_nan=False)


# --- directions -----------------------------------------------------------------------------------


METRICS = {
    "energy": lambda job: 100.0 + job.seed % 50,
    "top5": lambda job: job.seed % 37 / 37,
    "latency_ms": lambda job: 1.0 + job.seed % 20,
}


def test_declared_metrics_have_fronts_in_their_directions(tmp_path) -> None:
    directions = {"energy": "min", "top5": "max"}
    with scored(tmp_path, METRICS, directions=directions) as search:
        assert queries.front_metrics(search.store) == directions
        rows = list(search.store.candidates("state = 'done'"))
        points = {(row.fitness, row.metrics["top5"]) for row in rows}
        front = [
            (row.fitness, row.metrics["top5"])
            for row in queries.pareto_front(search.store, "top5", "max")
        ]
        figure = plots.overview(search.store)
        summary = report.report(search.store)
    beaten = {p for p in points for q in points if p != q and q[0] >= p[0] and q[1] >= p[1]}
    assert set(front) == points - beaten and front == sorted(front, reverse=True)
    labels = [axes.get_xlabel() for axes in figure.axes if "Pareto" in axes.get_title()]
    assert labels == ["energy", "top5 (more is better)"]
    assert "Pareto front, fitness against top5 (more is better): " in str(summary)
    values = summary.to_dict()
    assert values["directions"] == directions and list(values["pareto"]) == ["energy", "top5"]


def test_names_decide_only_if_nothing_is_declared(tmp_path) -> None:
    with scored(tmp_path / "a", METRICS) as search:
        assert queries.front_metrics(search.store) == {"latency_ms": "min"}
    with scored(tmp_path / "b", METRICS, directions={}) as search:
        assert queries.front_metrics(search.store) == {}
        assert report.report(search.store).fronts == {}


def test_all_candidates_say_which_metrics_there_are(tmp_path) -> None:
    """Let the first candidate lack the metric that all others have."""

    def evaluate(job: nas.Job) -> dict:
        return {"fitness": ones(job.architecture), **({"latency_ms": 1.0} if job.candidate else {})}

    with drive(small(tmp_path, cycles=10), evaluate) as search:
        assert queries.front_metrics(search.store) == {"latency_ms": "min"}
        title = panel(plots.overview(search.store), "Pareto front").get_title()
    assert title.endswith("(1 without a finite value not shown)")


def test_a_declared_metric_that_nobody_has(tmp_path) -> None:
    with scored(tmp_path, METRICS, cycles=10, directions={"enrgy": "min"}) as search:
        title = panel(plots.overview(search.store), "Pareto front").get_title()
        assert "against enrgy: 0 candidates" in str(report.report(search.store))
    assert title == "Pareto front: no candidate has a finite enrgy"


# --- names that are taken -------------------------------------------------------------------------


def test_a_metric_named_as_a_fact_hides_nothing(tmp_path) -> None:
    names = ("state", "parent", "mutation", "id", "mutation_kind", "Loss", "loss")
    metrics = {name: (lambda job, k=k: float(k)) for k, name in enumerate(names, start=70)}
    with scored(tmp_path, metrics, cycles=20):
        result = nas.load("search", tmp_path)
    row = result.history.iloc[-1]
    assert [row[f"metric {name}"] for name in names[:5]] == [70, 71, 72, 73, 74]
    assert (row["Loss"], row["loss"], row["state"]) == (75, 76, "done")
    page = html.candidate(result.reader, result.reader.candidate(19))
    assert ">done<" in page and ">metric state<" in page and ">70<" in page
