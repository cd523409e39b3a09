"""Run the notebooks, each in a kernel of its own, and check what they show."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from paths import NOTEBOOKS


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def run(name: str, folder: Path) -> nbformat.NotebookNode:
    """Execute a notebook in an empty folder; a cell that raises is an error."""
    notebook = read(name)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    return notebook


def shown(notebook: nbformat.NotebookNode, source: str) -> list[nbformat.NotebookNode]:
    """Return the outputs of the only cell whose code contains `source`."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    (cell,) = (cell for cell in code if source in f"{cell.source}\n")
    for output in cell.outputs:
        assert output.get("name") != "stderr", output.text
    return cell.outputs


def value(notebook: nbformat.NotebookNode, source: str, kind: str = "text/plain") -> str:
    """Return the last output of a cell in a MIME type."""
    return shown(notebook, source)[-1].data[kind]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_the_notebook_of_a_search(tmp_path):
    executed = run("search", tmp_path)
    assert "<svg" in value(executed, "space.random", "text/html")
    live = shown(executed, "result.watch()")[0].data["text/html"]
    assert "200/200 results" in live and "not running" in live
    assert "200 with a fitness" in value(executed, "result.wait()", "text/html")
    assert "mutation" in value(executed, "result.best\n", "text/html")
    for source in ("result.plot()", "plot_lineage()"):
        assert len(value(executed, source, "image/png")) > 20_000
    assert "hidden_state" in value(executed, "mutation_kind")
    assert "results=300" in value(executed, "resume(")
    assert 10 < float(value(executed, "search.ask()")) < 70


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_of_a_search_by_training(tmp_path):
    executed = run("training", tmp_path)
    assert "12 with a fitness" in value(executed, "result.wait()", "text/html")
    table = value(executed, "compile_s")
    assert "cpu 0" in table and "cpu 1" in table
    assert "<svg" in value(executed, "result.best\n", "text/html")
    text = "".join(output.text for output in shown(executed, "!gpipe train"))
    *_, last = re.findall(r"test_accuracy\s+([01]\.?\d*)", text)
    assert float(last) > 0.9


def test_the_notebook_of_a_pipeline(tmp_path):
    executed = run("pipeline", tmp_path)
    (printed,) = shown(executed, "print(pipe)")
    assert "mesh: 4 devices x 2 replicas" in printed.text
    assert len(value(executed, "plots.schedule(", "image/png")) > 5_000
    (lines,) = shown(executed, "peak_stash")
    assert "1f1b: 22 ticks, 4 stage inputs stashed at most" in lines.text
    pipelined, plain = eval(value(executed, "value_and_grad"))
    assert pipelined == pytest.approx(plain, rel=1e-5)
    plan = value(executed, "gpipe.plan(", "text/html")
    assert "stages 4, data 2, micro_batches 8" in plan and "by analysis" in plan
