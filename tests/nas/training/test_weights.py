"""Trained values: written at once, inherited where they agree, gone when no one needs them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import toy
from paths import HELPERS
from toy import job, search, trace

import nas
from nas.errors import LostWeightsError
from nas.training import weights
from nas.training.loop import Training

WARM = {"fitness_policy": "retrain_warm", "cycles": 14, "population": 5, "sample": 2}


@pytest.fixture(autouse=True)
def no_cache_on_disk(monkeypatch) -> None:
    monkeypatch.setattr("nas.training.compilation_cache.use", lambda folder: None)


def files(result: nas.Result) -> set[str]:
    return {f"weights/{path.name}" for path in (result.path / "weights").iterdir()}


def test_values_come_back_as_they_were(tmp_path) -> None:
    network, candidate = toy.toy().network(), job(1)
    values = network.init(network.encode(candidate.architecture), jax.random.key(0))
    weights.save(tmp_path / "weights" / "1-1.safetensors", candidate.architecture, values)
    architecture, loaded = weights.load(tmp_path / "weights" / "1-1.safetensors", network)
    np.testing.assert_array_equal(architecture, network.encode(candidate.architecture))
    jax.tree.map(np.testing.assert_array_equal, values, loaded)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["1-1.safetensors"]


def test_a_damaged_file_and_another_networks(tmp_path) -> None:
    network, candidate = toy.toy().network(), job(1)
    values = network.init(network.encode(candidate.architecture), jax.random.key(0))
    path = tmp_path / "1-1.safetensors"
    weights.save(path, candidate.architecture, values)
    nested = (100_000).to_bytes(8, "little") + b"[" * 100_000
    for damaged in (path.read_bytes()[:50], nested):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"1-1.safetensors cannot be read \(.*; remove the f"):
            weights.load(path, network)
    with pytest.raises(ValueError, match=r"2.safetensors cannot be read \(FileNotFoundError"):
        weights.load(tmp_path / "2.safetensors", network)
    weights.save(path, candidate.architecture, values)
    other = replace(network, shape=replace(network.shape, classes=4))
    with pytest.raises(ValueError, match=r"of another network: .*outer.* is of shape \[10, 10\]"):
        weights.load(path, other)


def test_child_inherits_where_it_agrees(tmp_path, monkeypatch) -> None:
    starts, run = [], Training.run

    def spy(self, rivals=()):
        starts.append(jax.device_get(self.values))
        return run(self, rivals)

    monkeypatch.setattr(Training, "run", spy)
    evaluator = replace(toy.toy(), run=str(tmp_path))
    parent, child = job(1), job(2)
    name = evaluator.evaluate(parent)["trained_values"]
    assert name == "weights/1-1.safetensors"
    evaluator.evaluate(child)
    evaluator.evaluate(replace(child, inherit=name))
    _, fresh, warm = (values.parameters["inner"] for values in starts)
    network = evaluator.network()
    _, trained = weights.load(tmp_path / name, network)
    shared = network.encode(parent.architecture) * network.encode(child.architecture) > 0
    assert shared.any() and not shared.all()
    np.testing.assert_array_equal(warm[:, shared], trained.parameters["inner"][:, shared])
    np.testing.assert_array_equal(warm[:, ~shared], fresh[:, ~shared])


def test_warm_search_keeps_weights_of_members_only(tmp_path) -> None:
    def look(search: nas.Search) -> None:
        names = {path.name for path in (tmp_path / "search" / "weights").iterdir()}
        most.append(len(names))

    most: list[int] = []
    result = search(tmp_path, **WARM, callback=look)
    members = {row.trained_values for row in result.reader.population()}
    assert files(result) == members and len(members) <= 5
    assert max(most) <= 5 + 2
    retrained = [e for e in result.reader.events() if e.kind == "retrain"]
    assert len(retrained) > 5
    nas.replay(result.reader, nas.NASNetSpace())


@pytest.mark.parametrize("policy", ["stored", "retrain_scratch"])
def test_other_policies_keep_none(tmp_path, policy) -> None:
    result = search(tmp_path, **{**WARM, "fitness_policy": policy})
    assert not (result.path / "weights").exists()
    assert not any(row.trained_values for row in result.reader.candidates())
    assert result.counts.evaluations > 14 or policy == "stored"


class Elsewhere(nas.Evaluator):
    """Trains on another host, on whose disk the run's folder is another."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk

    def prepare(self, space, folder, *rest):
        return toy.toy().prepare(space, self.disk / folder.name, *rest)

    def evaluate(self, job: nas.Job) -> None:
        raise NotImplementedError


def test_search_ends_if_workers_cannot_see_its_folder(tmp_path) -> None:
    whole = search(tmp_path, name="whole", **WARM)
    problem = r"^thread 0 has written the weights weights/0-1.safetensors, but in .*/search o"
    remedy = ".*: with retrain_warm .* resume with workers on this machine, such as 'devices', or"
    with pytest.raises(LostWeightsError, match=problem + remedy):
        search(tmp_path, Elsewhere(tmp_path / "disk"), **WARM)
    assert (tmp_path / "disk" / "search" / "weights" / "0-1.safetensors").exists()
    result = nas.load("search", tmp_path)
    assert (result.counts.results, result.counts.failures) == (0, 0)
    assert trace(result.resume(evaluate=toy.toy())) == trace(whole)
    assert len(files(result)) == len(files(whole))


def test_resume_removes_orphaned_weights_only(tmp_path) -> None:
    whole = search(tmp_path, name="whole", **WARM)
    search(tmp_path, name="parts", **WARM, callback=lambda s: s.evolution.results >= 9)
    folder = tmp_path / "parts" / "weights"
    for name in ("3-99.safetensors", "3-99.safetensors.12.tmp", "mine.safetensors"):
        (folder / name).write_bytes(b"")
    result = nas.load("parts", tmp_path).resume()
    assert trace(result) == trace(whole)
    assert files(result) == files(whole) | {"weights/mine.safetensors"}
    for path in (whole.path / "weights").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()


RUN = """
import sys
import nas
from nas import NASNetSpace
sys.path[:0] = {paths!r}
import toy
from nas.training import compilation_cache
compilation_cache.use({cache!r})
toy.search({folder!r}, {evaluator}, name="killed", **{options!r})
"""


@pytest.mark.parametrize(
    ("kills", "evaluator"),
    [
        (1, "toy.toy()"),
        pytest.param(10, "toy.toy()", marks=pytest.mark.slow),
        pytest.param(10, "toy.small()", marks=pytest.mark.slow),
    ],
)
def test_killed_search_resumes_identically(tmp_path, kills, evaluator) -> None:
    """SIGKILL at random instants: the same proposals, results and files, bit by bit."""
    options = {**WARM, "cycles": 10 + 4 * kills}
    if evaluator == "toy.small()":
        options["space"] = toy.SMALL_SPACE
    whole = search(tmp_path, eval(evaluator), name="whole", **options)
    code = RUN.format(
        paths=[str(path) for path in HELPERS], cache=str(tmp_path / "cache"), folder=str(tmp_path),
        options=options, evaluator=evaluator,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    total = whole.counts.evaluations
    for number in range(kills + 1):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment)
        goal = total * (number + rng.random()) / kills if number < kills else np.inf
        while process.poll() is None and _evaluations(tmp_path / "killed") < goal:
            time.sleep(0.01)
        if number < kills:
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        process.wait(timeout=300)
    assert process.returncode == 0
    killed = nas.load("killed", tmp_path)
    assert killed.counts.running == 0
    assert trace(killed) == trace(whole)
    fitness = [(e.kind, e.candidate, e.fitness) for e in killed.reader.events() if e.fitness]
    assert fitness == [(e.kind, e.candidate, e.fitness) for e in whole.reader.events() if e.fitness]
    assert _values(killed) == _values(whole)
    nas.replay(killed.reader, killed.space)


def _evaluations(run: Path) -> int:
    try:
        return nas.load(run).counts.evaluations
    except (OSError, ValueError):
        return 0


def _values(result: nas.Result) -> dict[int, bytes]:
    """Return the weights by member, because lost evaluations change the names."""
    folder = result.path / "weights"
    names = {row.id: row.trained_values for row in result.reader.population()}
    assert {path.name for path in folder.iterdir()} == {Path(n).name for n in names.values() if n}
    return {number: (result.path / name).read_bytes() for number, name in names.items() if name}
