"""Pictures of a run show the numbers of its store."""

import random
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from searches import drive, small

import nas
from gpipe_jax.utils import graph_drawing
from nas.reports import html, lineage, plots
from nas.spaces import pictures as spaces_pictures
from nas.spaces.nasbench201 import EDGES, OPERATIONS
from nas.storage import queries

NAMES = ["best so far", "population", "cache", "workers"]


def score(job) -> dict:
    text = str(job.architecture)
    return {"fitness": text.count("sep") - job.seed % 7 / 10, "params_m": len(text) / 100}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Return a search of cells with a cost, with its store open."""
    folder = tmp_path_factory.mktemp("cells")
    options = {"space": nas.NASNetSpace(pairs=3), "cycles": 120, "cache": True, "sample": 5}
    with drive(small(folder, **options), score, slots=3) as search:
        yield search


def panel(figure, title: str):
    (axes,) = (axes for axes in figure.axes if axes.get_title().startswith(title))
    return axes


def line(axes, label: str) -> np.ndarray:
    """Points [N, 2] of a line."""
    (match,) = (each for each in axes.lines if each.get_label() == label)
    return np.array(match.get_xydata())


def test_the_overview_has_the_numbers_of_the_store(cells, tmp_path) -> None:
    figure = plots.overview(cells.store, tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes().startswith(b"\x89PNG")
    course, rows = queries.progress(cells.store), {r.id: r for r in cells.store.candidates()}
    best = panel(figure, "best so far")
    places = np.arange(1, 121)
    np.testing.assert_array_equal(line(best, "best so far"), np.c_[places, course.best])
    fitness = [rows[number].fitness for number in course.candidate]
    np.testing.assert_array_equal(line(best, "a candidate"), np.c_[places, fitness])
    saved = panel(figure, "cache")
    hits = cells.store.counts().cache_hits
    assert hits > 0 and saved.get_title() == f"cache: {hits} of 120 saved ({hits / 120:.0%})"
    assert line(saved, "evaluations for them")[-1].tolist() == [120, 120 - hits]
    members = panel(figure, "population, 8 members").lines[0].get_xydata()
    assert sorted(members[:, 1]) == sorted(row.fitness for row in cells.store.population())
    assert figure.get_suptitle() == "search"


def test_the_front_of_a_cost(cells) -> None:
    axes = panel(plots.overview(cells.store), "Pareto front")
    front = [
        (row.metrics["params_m"], row.fitness)
        for row in queries.pareto_front(cells.store, "params_m")
    ]
    np.testing.assert_array_equal(line(axes, "Pareto front"), front[::-1])
    assert axes.get_xlabel() == "params_m" and len(line(axes, "a candidate")) == 120


def test_each_evaluation_has_a_bar_in_its_workers_row(tmp_path) -> None:
    def evaluate(bits) -> float:
        return float("nan") if sum(bits) == 6 else float(sum(bits))

    result = nas.search(
        space=small(tmp_path / "x").space, evaluate=evaluate, workers=2, population=8, sample=3,
        cycles=40, cache=False, folder=tmp_path,
    )  # fmt: skip
    axes = panel(result.plot(), "workers")
    names = [label.get_text() for label in axes.get_yticklabels()]
    bars = {(bar.worker, bar.outcome, bar.start) for bar in queries.timeline(result.reader).bars}
    colours = {rgb(colour): outcome for outcome, colour in plots.OUTCOMES.items()}
    drawn = set()
    for collection in axes.collections:
        outcome = colours[tuple(np.round(collection.get_facecolor()[0, :3] * 255))]
        for path in collection.get_paths():
            (x, y), _ = path.vertices.min(0), path.vertices.max(0)
            drawn.add((names[round(y + 0.4)], outcome, x))
    assert drawn == bars and {outcome for _, outcome, _ in drawn} == {"ok", "nan"}


def rgb(colour: str) -> tuple:
    return tuple(float(int(colour[i : i + 2], 16)) for i in (1, 3, 5))


@pytest.mark.parametrize("maximise", [True, False])
def test_far_worse_ones_are_left_out_and_counted(tmp_path, maximise) -> None:
    sign = 1 if maximise else -1
    values = [sign * (90 + i % 10 - 80 * (i < 12)) for i in range(100)]
    with small(tmp_path, cycles=100, maximise=maximise) as search:
        for value in values:
            search.tell(search.ask(), value)
        axes = panel(plots.overview(search.store), "best so far")
    assert axes.get_title() == "best so far (12 worse ones not shown)"
    low, high = axes.get_ylim()
    assert sum(low <= value <= high for value in values) == 88


@pytest.mark.parametrize("state", ["empty", "going", "one", "failures"])
def test_runs_of_any_state_have_a_picture(tmp_path, state) -> None:
    with small(tmp_path, max_failures=100, retries=nas.Retries(nan=0)) as search:
        if state != "empty":
            jobs = [search.ask() for _ in range(4)]
            if state == "one":
                search.tell(jobs[0], 1.0)
            if state == "failures":
                [search.tell(job, float("nan")) for job in jobs]
        figure = plots.overview(search.store, tmp_path / "it.png")
    rows = [text.get_text() for text in panel(figure, "workers").get_yticklabels()]
    failed = [f"unknown {k}" for k in range(1, 5)]
    one, going = ["3 running", "unknown 1"], ["4 running"]
    assert rows == {"empty": [], "one": one, "going": going, "failures": failed}[state]


def test_pictures_are_made_while_a_search_goes_on(tmp_path) -> None:
    space = nas.NASNetSpace(pairs=2)
    result = nas.search(
        space=space, evaluate=lambda one: len(str(one)), workers=2, population=8, sample=3,
        cycles=100_000, folder=tmp_path, wait=False, cache=False,
    )  # fmt: skip
    shown = []
    for _ in range(3):
        axes = panel(result.plot(), "best so far")
        shown.append(len(line(axes, "best so far")))
    assert result.is_running and result._repr_html_()
    result.stop()
    assert 0 <= shown[0] < shown[1] < shown[2] <= result.counts.results


def test_notebooks_show_a_figure_and_keep_their_settings(cells) -> None:
    from matplotlib import pyplot

    before = pyplot.get_backend(), pyplot.get_fignums()
    assert plots.overview(cells.store)._repr_png_().startswith(b"\x89PNG")
    assert (pyplot.get_backend(), pyplot.get_fignums()) == before


# --- cells and what differs -----------------------------------------------------------------------


def marks(drawn: graph_drawing.Picture) -> list[str]:
    return [box.text for box in drawn.boxes if box.border == graph_drawing.MARK]


def test_marked_is_what_a_mutation_has_changed() -> None:
    space, rng = nas.NASNetSpace(), random.Random(0)
    kinds = set()
    for _ in range(60):
        parent = space.random(rng)
        child, words = space.mutate(parent, rng)
        lines = child.differences(parent)
        marked = [text for cell in child.pictures(parent) for text in marks(cell)]
        if child == parent:
            assert not lines and not marked
            continue
        kind, _, rest = words.partition(": ")
        kinds.add(kind)
        assert lines[0] == rest.replace(", ", ": ").replace("->", "→")
        assert marked[0] == rest.split("-> ")[1].split("(")[0]
        assert len(lines) == len(marked) <= 2  # the element, and perhaps the output
    assert kinds == {"op", "hidden_state"}


def drawn_cell(edges, before=None):
    (picture,) = nas.NASBench201Space().pictures(edges, before)
    return picture


def test_a_cell_of_nasbench201_can_be_read_off_its_picture() -> None:
    rng = random.Random(1)
    for _ in range(20):
        edges = nas.NASBench201Space().random(rng)
        drawn = drawn_cell(edges)
        bottoms = {(box.x, box.y + graph_drawing.BOX_HEIGHT): box.text for box in drawn.boxes}
        tops = {(box.x, box.y): box.text for box in drawn.boxes}
        nodes = {box.y: int(box.text[0]) for box in drawn.boxes if box.text[0].isdigit()}
        operations = {}
        for above, below in zip(drawn.edges[::2], drawn.edges[1::2], strict=True):
            source = nodes[above.points[0][1] - graph_drawing.BOX_HEIGHT]
            target = nodes[below.points[1][1]]
            assert tops[above.points[1]] == bottoms[below.points[0]]
            operations[source, target] = tops[above.points[1]]
        assert [OPERATIONS.index(operations[edge]) for edge in EDGES] == list(edges)


def test_marked_are_the_edges_that_differ() -> None:
    drawn = drawn_cell((3, 3, 0, 3, 3, 3), (3, 3, 3, 3, 3, 3))
    assert marks(drawn) == ["none"]
    lines = nas.NASBench201Space().differences((3, 3, 0, 3, 3, 3), (3, 3, 3, 3, 3, 3))
    assert lines == ["edge 1 to 2: nor_conv_3x3 → none"]


@pytest.mark.parametrize("seed", range(3))
def test_nothing_of_a_nasbench201_cell_covers_another_box(seed) -> None:
    drawn = drawn_cell(nas.NASBench201Space().random(random.Random(seed)))
    for i, a in enumerate(drawn.boxes):
        assert len(a.text) * 6.6 <= a.width
        for b in drawn.boxes[:i]:
            beside = abs(a.x - b.x) >= (a.width + b.width) / 2 + 5
            assert beside or abs(a.y - b.y) >= graph_drawing.BOX_HEIGHT + 5
    for wire in drawn.edges:
        (x0, y0), (x1, y1) = wire.points
        for t in np.linspace(0, 1, 30):
            x = x0 + (x1 - x0) * (3 * t**2 - 2 * t**3)
            y = y0 + (y1 - y0) * (1.5 * t - 1.5 * t**2 + t**3)
            for box in drawn.boxes:
                inside = box.y < y < box.y + graph_drawing.BOX_HEIGHT
                assert not inside or abs(x - box.x) > box.width / 2


def test_the_lineage_has_all_ancestors_and_their_changes(cells, tmp_path) -> None:
    number = next(cells.store.ranked()).id
    rows, steps = cells.store.lineage(number), lineage.steps(cells.store, number)
    assert [step.row.id for step in steps] == [row.id for row in rows] and len(rows) > 3
    assert len(steps[0].pictures) == 2  # both cells of the random ancestor
    for step in steps[1:]:
        kind, words = step.row.mutation.split(": ", 1)
        if kind == "identity":
            assert step.lines == ["no change"] and not step.pictures
        elif step.pictures:
            assert step.lines[0] == words.replace(", ", ": ").replace("->", "→")
            assert all(marks(picture) for picture in step.pictures)
    figure = lineage.figure(cells.store, number, tmp_path / "lineage.png")
    (curve,) = figure.axes[0].lines
    np.testing.assert_array_equal(curve.get_ydata(), [row.fitness for row in rows])
    texts = [text.get_text() for text in figure.texts]
    for step in steps:
        assert lineage.heading(step.row) in texts
    assert {text for text in texts if "→" in text} == {
        text for step in steps for text in step.lines if "→" in text
    }
    pictures = sum(len(step.pictures) for step in steps)
    assert len(figure.axes) == 1 + pictures


def test_long_lineages_are_shortened(cells, monkeypatch) -> None:
    monkeypatch.setattr(lineage, "MAX_ANCESTORS", 3)
    number = next(cells.store.ranked()).id
    rows = cells.store.lineage(number)
    figure = lineage.figure(cells.store, number)
    headings = [text.get_text() for text in figure.texts if text.get_text()[0] == "#"]
    shown = [lineage.heading(row) for row in (rows[0], *rows[-2:])]
    assert list(dict.fromkeys(headings)) == shown
    title = figure.axes[0].get_title()
    left_out = f"{len(rows)} generations; {len(rows) - 3} after the first are not drawn"
    assert title.endswith(left_out) and len(figure.axes[0].lines[0].get_xydata()) == len(rows)
    assert left_out in html.lineage(cells.store, number)


def test_users_spaces_are_shown_as_text(tmp_path) -> None:
    with drive(small(tmp_path, cycles=30)) as search:
        number = max(row.id for row in search.store.candidates("parent IS NOT NULL"))
        steps = lineage.steps(search.store, number)
        architecture = spaces_pictures.read("bits", "<0110>")
        figure = lineage.figure(search.store, number)
    assert steps[0].lines == [f"random: {steps[0].row.architecture}"]
    assert steps[1].lines == [f"{steps[0].row.architecture} → {steps[1].row.architecture}"]
    assert ElementTree.fromstring(spaces_pictures.html(architecture)).text == "<0110>"
    assert len(figure.axes) == 1
    assert spaces_pictures.pictures(spaces_pictures.read("nasnet", "no JSON")) == []
