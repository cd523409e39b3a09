"""`nas report`, the page it writes, and what notebooks and terminals show of a run."""

import io
import json
import re
import sqlite3
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
from rich.console import Console
from searches import Bits, drive, ones, small

import nas
from gpipe_jax.utils.graph_drawing import Box, Picture
from nas import cli
from nas.evolution.length import Length
from nas.reports import html, live, report
from nas.storage.queries import Snapshot
from nas.storage.reader import Counts, Reader

EVIL = "<script>alert('&')</script>"
VOID = {"img", "meta", "br"}


class Checked(HTMLParser):
    """Parse a page; check that elements are closed in order and nothing else is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert name not in ("href", "srcset", "action", "data", "poster") and name[:2] != "on"
            assert name != "src" or value.startswith("data:image/png;base64,")
            assert "url(" not in (value or "")

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        assert "url(" not in data and "@import" not in data
        self.texts.append(data)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`nas report ...` in a folder with the run `mine`: (code, lines, stderr)."""
    monkeypatch.chdir(tmp_path)
    with drive(small("runs", name="mine", cache=True), metrics, slots=2):
        pass

    def command(*arguments: str):
        code = cli.main(["report", *arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out.splitlines(), err

    return command


def metrics(job) -> dict:
    return {"fitness": ones(job.architecture), "params_m": job.seed % 10}


def test_the_report_has_the_numbers_of_the_store(run) -> None:
    code, lines, _ = run("mine", "--json")
    figures, counts = json.loads(lines[-1]), Reader("runs/mine").counts()
    assert code == 0 and figures["page"] == "runs/mine/report.html"
    assert {name: figures[name] for name in counts._fields} == counts._asdict()
    best = next(Reader("runs/mine").ranked())
    assert figures["best_fitness"] == best.fitness == figures["best"][0]["fitness"]
    assert figures["best"][0]["architecture"] == best.architecture
    assert len({entry["architecture"] for entry in figures["best"]}) == len(figures["best"])
    assert figures["settings"]["population"] == 8 and not figures["is_running"]
    text = "\n".join(lines)
    assert "not running" in text and "maximise, population 8, sample 3" in text
    assert f"60 proposed, 60 with a fitness, {counts.rejected} beyond" in text
    assert re.search(rf"cache hits +{counts.cache_hits} \(\d+% of", text)
    assert re.search(rf"^#{best.id} +{best.fitness:g} ", text, re.MULTILINE)
    front = figures["pareto"]["params_m"]
    assert f"fitness against params_m: {len(front)} candidates" in text
    assert front[0]["fitness"] == best.fitness


def test_infinite_costs_are_in_no_front_and_no_json(run) -> None:
    """Such as the latency of networks of which none fits."""
    with sqlite3.connect("runs/mine/search.sqlite") as connection:
        connection.execute("UPDATE candidates SET metrics = '{\"params_m\": Infinity}'")
    code, lines, err = run("mine", "--json")
    assert code == 0, err
    figures = json.loads(lines[-1], parse_constant=pytest.fail)
    assert figures["pareto"] == {"params_m": []}
    assert figures["best"][0]["metrics"]["params_m"] is None


def test_the_page_needs_nothing_else_and_escapes(run, tmp_path) -> None:
    with sqlite3.connect("runs/mine/search.sqlite") as connection:
        connection.execute("UPDATE study SET name = ?", (EVIL,))
        connection.execute("UPDATE candidates SET mutation = ?, architecture = ?", (EVIL, EVIL))
        connection.execute("UPDATE evaluations SET outcome = 'nan', error = ?", (EVIL,))
    code, lines, _ = run("mine", "--out", "page.html")
    assert code == 0 and lines[-1] == "page: page.html"
    page = Checked((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "script" not in page.seen and page.seen.count("img") == 1
    assert page.texts.count(EVIL) >= 14  # title, heading; each of ten mutations; an error; ...
    assert (code, run("mine", "--out", "page.html")[0]) == (0, 0)  # a page of ours is renewed


def test_a_page_draws_the_cells_and_the_ancestors(tmp_path) -> None:
    space = nas.NASNetSpace(pairs=3)
    with drive(small(tmp_path, space=space), lambda job: len(str(job.architecture))) as search:
        text, best = html.page(search.store), next(search.store.ranked())
        ancestors = search.store.lineage(best.id)
    page = Checked(text)
    assert page.seen.count("figure") == len(ancestors) > 1
    assert page.seen.count("svg") >= 2 + 2  # the best, the first; and what the others changed
    assert any(f"#{best.id}" in each for each in page.texts)


@pytest.mark.parametrize("of", ["nothing", "failures", "running"])
def test_a_report_of_any_state(tmp_path, of) -> None:
    with small(tmp_path, max_failures=100) as search:
        jobs = [search.ask() for _ in range(5 * (of != "nothing"))]
        if of == "failures":
            for job in jobs:
                search.tell(job, float("nan"))
        elif jobs:
            search.tell(jobs[0], 3.0)
        snapshot = Snapshot(tmp_path / "search")
        summary = report.report(snapshot)
        Checked(html.page(snapshot))
    text = str(summary)
    assert "running" in text and "not running" not in text and summary.is_running
    assert summary.to_dict()["best_fitness"] == (3.0 if of == "running" else None)
    assert ("best candidates" in text) is (of == "running")
    if of == "failures":
        assert summary.to_dict()["failures_by_kind"] == {"nan": 5}
        assert "0 done, 5 failed" in text and "the fitness is nan" in text
    if of == "running":
        assert "1 done, 0 failed, 4 running" in text
        later = str(report.report(Reader(tmp_path / "search")))
        assert "4 running when the last driver ended" in later


def test_bad_runs_get_a_plain_message(run, tmp_path) -> None:
    code, lines, error = run("nine")
    assert (code, lines) == (2, [])
    assert (
        "no run 'nine': runs/nine/search.sqlite does not exist; the folder runs has: mine" in error
    )
    for name, content, problem in (
        ("text", b"a diary of many words" * 50, "nor any SQLite database"),
        ("empty", b"", "search.sqlite holds no search: give the name of another run"),
    ):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "search.sqlite").write_bytes(content)
        code, lines, error = run(name)
        assert (code, lines) == (2, [])
        assert "no search can be read here" in error and problem in error


def test_export_needs_a_result_but_not_the_code_of_the_space(run, tmp_path, capsys) -> None:
    assert cli.main(["export", "mine", "--out", "best.json"]) == 0
    best = next(Reader("runs/mine").ranked())
    assert json.loads((tmp_path / "best.json").read_text()) == json.loads(best.architecture)
    with small("runs", name="new") as search:
        search.ask()
    assert cli.main(["export", "new", "--out", "new.json"]) == 2
    assert "has no result yet; wait for the first evaluation" in capsys.readouterr().err


def test_a_page_replaces_no_other_file(run, tmp_path) -> None:
    (tmp_path / "mine.html").write_text("my own")
    code, _, error = run("mine", "--out", "mine.html")
    assert code == 2 and "--out mine.html: already exists and is not a report of a search" in error
    assert (tmp_path / "mine.html").read_text() == "my own"
    (tmp_path / "runs" / "mine" / "report.html").write_text("my own")
    code, _, error = run("mine")
    assert code == 2 and "--out" not in error and "report.html: already exists and is not" in error
    code, _, error = run("mine", "--out", "no/page.html")
    assert code == 2 and "--out no/page.html: the folder no does not exist; create it" in error


def test_an_error_while_the_page_is_built_is_not_blamed_on_the_option(run, monkeypatch) -> None:
    def fail(_: object) -> None:
        raise OSError("the disk is broken")

    monkeypatch.setattr("nas.reports.html.page", fail)
    code, _, error = run("mine", "--out", "new.html")
    assert code == 2 and "the disk is broken" in error and "--out" not in error


# --- in a notebook --------------------------------------------------------------------------------


def test_html_of_a_result_and_of_a_candidate(tmp_path) -> None:
    result = nas.search(
        space="nasbench201", evaluate=lambda edges: sum(edges), population=6, sample=3, cycles=40,
        folder=tmp_path, name=EVIL.replace("/", ""),
    )  # fmt: skip
    page = Checked(result._repr_html_())
    assert EVIL.replace("/", "") in "".join(page.texts) and "script" not in page.seen
    assert page.seen.count("svg") == 1 and f"#{result.best.number}" in page.texts
    child = max(result.lineage(result.best.number), key=lambda each: each.number)
    shown = child._repr_html_()
    Checked(shown)
    assert child.row.mutation.replace(">", "&gt;") in shown and f"#{child.row.parent}" in shown
    svg = ElementTree.fromstring(shown[shown.index("<svg") : shown.index("</svg>") + 6])
    boxes = [rect for rect in svg if rect.get("fill") == "#ffe066"]
    assert len(boxes) == 1  # the edge that was mutated
    assert child.plot_lineage().axes[0].get_title().endswith(f"{len(child.lineage)} generations")
    random = result.candidate(0)._repr_html_()
    assert "none, it is random" in random and "#ffe066" not in random


class DrawnBits(Bits):
    """Have a picture for each bit that is one, so that their number changes."""

    def pictures(self, bits, before=None):
        color = "#ffffff" if before is None else "#ffe066"
        return [
            Picture(f"bit {i}", 40.0, 60.0, [Box(20.0, 40.0, 20.0, "1", color)], [])
            for i, bit in enumerate(bits)
            if bit
        ]

    def differences(self, bits, before):
        return [f"{sum(bits) - sum(before)} more"]


def test_a_space_of_a_user_is_drawn_if_it_is_known(tmp_path, monkeypatch) -> None:
    result = nas.search(
        space=DrawnBits(), evaluate=ones, population=6, sample=3, cycles=40, folder=tmp_path
    )
    best = result.best
    assert Checked(result._repr_html_()).seen.count("svg") == best.fitness > 0
    assert Checked(best._repr_html_()).seen.count("svg") == best.fitness
    texts = [text.get_text() for text in best.plot_lineage().texts]
    assert any(text.startswith("bit ") for text in texts)
    page = html.page(result.reader, result.space)
    assert "svg" in Checked(page).seen and "1 more" in page
    assert "svg" not in Checked(html.page(result.reader)).seen
    loaded = nas.load("search", tmp_path)
    assert Checked(loaded._repr_html_()).seen.count("svg") == best.fitness
    assert Checked(loaded.best._repr_html_()).seen.count("svg") == best.fitness
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "somebody else's"))
    loaded = nas.load("search", tmp_path)
    assert "svg" not in Checked(loaded._repr_html_()).seen  # no code of the run is run
    assert "svg" not in Checked(loaded.best._repr_html_()).seen


# --- while it runs --------------------------------------------------------------------------------


def test_the_line_of_a_search(tmp_path) -> None:
    with small(tmp_path) as search:
        assert live.line(search.store, search.length) == "0/60 results, 0 evaluations"
        first, second, _ = search.ask(), search.ask(), search.ask()
        search.tell(first, 2.0)
        search.tell(second, float("nan"))
        text = "1/60 results, best 2 (#0), 1 evaluations, 1 failures, 1 running"
        assert live.line(search.store, search.length) == text
        assert live.line(search.store) == text.replace("/60", "")


def test_the_line_of_a_search_with_a_budget(tmp_path) -> None:
    with small(tmp_path, evaluations=9) as search:
        search.tell(search.ask(), 2.0)
        text = "1 results, best 2 (#0), 1/9 evaluations"
        assert live.line(search.store, search.length) == text


def test_lines_are_printed_by_the_budget(capsys) -> None:
    show, counts = live._printed(Length(1000, 20)), Counts(*[0] * 8)
    for evaluations in range(1, 21):
        show(f"{evaluations} done", counts._replace(evaluations=evaluations), False)
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["1 done", *(f"{n} done" for n in range(2, 21, 2))]


def slow(bits) -> float:
    import time

    time.sleep(0.005)
    return ones(bits)


def test_watching_prints_lines_and_waits(tmp_path, capsys) -> None:
    result = nas.search(
        space=Bits(), evaluate=slow, population=8, sample=3, cycles=60, folder=tmp_path, wait=False,
        cache=False,
    )  # fmt: skip
    result.watch(every_s=0.01)
    assert not result.is_running
    lines = capsys.readouterr().out.splitlines()
    assert 2 < len(lines) <= 12 and lines[-1].endswith("not running")
    done = [int(line.split("/60 results")[0]) for line in lines]
    assert done == sorted(done) and done[-1] == 60
    nas.load("search", folder=tmp_path).watch()  # of a search that is over, or of another process
    assert capsys.readouterr().out.startswith("60 results")
    again = nas.search(
        space=Bits(), evaluate=slow, population=8, sample=3, cycles=60, folder=tmp_path, cache=False
    )
    again.watch()
    assert "60/60 results" in capsys.readouterr().out


def test_watching_raises_what_ended_the_search(tmp_path, capsys) -> None:
    def broken(bits) -> float:
        raise OSError("no disk")

    result = nas.search(
        space=Bits(), evaluate=broken, population=8, sample=3, cycles=60, folder=tmp_path,
        wait=False,
    )  # fmt: skip
    with pytest.raises(nas.FailuresError, match="no disk"):
        result.watch(every_s=0.01)
    last = capsys.readouterr().out.splitlines()[-1]
    assert "; stopped by FailuresError: 10 evaluations" in last and "no disk" in last


def test_on_a_terminal_the_line_is_renewed_in_place() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    show = live._terminal(console)
    counts = Counts(*[0] * 8)
    show("1/3 results", counts._replace(results=1), False)
    show("3/3 results", counts._replace(results=3), True)
    text = console.file.getvalue()
    assert text.count("\r") == 2 and text.count("\n") == 1 and text.endswith("\n")
