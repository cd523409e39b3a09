"""Candidates are trained as the recipe says, and errors say what is wrong."""

import functools
import math
import pickle
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy import SLOTS, SMALL_SPACE, job, search, small, toy, trace

import nas
from gpipe_jax import data
from nas.choices import DATASETS
from nas.errors import MismatchError
from nas.training import datasets, programs
from nas.training.datasets import Augmentation, Data, Split
from nas.training.loop import Training
from nas.training.network import Variables
from nas.training.recipe import Scalars, learning_rate
from nas.workers import task


@pytest.fixture(autouse=True)
def no_cache_on_disk(monkeypatch) -> None:
    monkeypatch.setattr("nas.training.compilation_cache.use", lambda folder: None)


def numbers(metrics: dict) -> dict:
    """Return the metrics that do not depend on the clock."""
    return {name: value for name, value in metrics.items() if not name.endswith("_s")}


def test_training_learns_and_repeats_by_its_seed_alone(monkeypatch) -> None:
    monkeypatch.setattr(programs, "_programs", {})  # another test may have compiled them
    evaluator = toy(epochs=12)
    metrics = evaluator.evaluate(job(3))
    assert metrics["fitness"] > 0.5 and metrics["train_loss"] < 2
    assert metrics["train_s"] > 0 and metrics["compile_s"] > 0
    again = evaluator.evaluate(job(3))
    assert again["compile_s"] == 0 and numbers(again) == numbers(metrics)
    evaluator.evaluate(job(4))
    with jax.default_device(jax.local_devices()[5]):
        assert numbers(pickle.loads(pickle.dumps(evaluator)).evaluate(job(3))) == numbers(metrics)
    assert numbers(evaluator.evaluate(job(3, seed=4))) != numbers(metrics)


def test_training_in_bfloat16_learns_too() -> None:
    half, single = (toy(epochs=12, dtype=dtype) for dtype in ("bfloat16", "float32"))
    half_result, single_result = half.evaluate(job(3)), single.evaluate(job(3))
    assert half_result["fitness"] > 0.5 and half_result["train_loss"] < 2
    assert half_result["train_loss"] == pytest.approx(single_result["train_loss"], rel=0.02)
    assert half_result["train_loss"] != single_result["train_loss"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_interpreter_learns_in_bfloat16(tmp_path) -> None:
    options = {"filters": 4, "examples": 256, "epochs": 12, "validation_images": 200}
    evaluator = small(dtype="bfloat16", learning_rate=0.1, **options)
    prepared = evaluator.prepare(SMALL_SPACE, tmp_path, "stored", None)
    result = prepared.evaluate(nas.Job(0, 0, SMALL_SPACE.random(Random(0)), seed=0))
    assert result["fitness"] > 0.3 and result["train_loss"] < 1.8


def test_an_epoch_is_this_loop() -> None:
    """Momentum, decay, schedule, and batches in random order."""
    evaluator = toy(batch_size=100, weight_decay=0.1, momentum=0.5, warmup_epochs=1.5)
    evaluator = replace(evaluator, data="digits", label_smoothing=0.1)
    network, recipe = evaluator.network(), replace(evaluator._recipe(), augmentation=Augmentation())
    architecture = network.encode(job().architecture)
    data = Split(*map(jnp.asarray, evaluator._data().split()))
    scalars = Scalars(np.uint32(7), np.float32(0.3), np.float32(3), np.float32(6))
    state, _ = programs.start(network, recipe, architecture, 7)
    seen = []

    def loss(parameters, statistics, index):
        values = Variables(parameters, statistics)
        scores, new = network.apply(architecture, values, data.images[index], train=True)
        expected = 0.9 * jax.nn.one_hot(data.labels[index], 10) + 0.1 / 10
        return -(expected * jax.nn.log_softmax(scores)).sum(-1).mean(), new

    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    want, velocity = state.values, jax.tree.map(jnp.zeros_like, state.values.parameters)
    step, used = 0, network.used(architecture)
    for _ in range(3):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 1), step)
        order = jax.random.permutation(jax.random.split(key)[0], 256)[:200].reshape(2, 100)
        seen.append(set(np.ravel(order).tolist()))
        losses = []
        for index in order:
            (value, new), gradient = gradients(*want, index)
            losses.append(value)
            now = 0.3 * (
                (step + 1) / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 3)) / 2
            )
            velocity = jax.tree.map(
                lambda v, g, p, u: 0.5 * v + g + 0.1 * p * u,
                velocity, gradient, want.parameters, used,
            )  # fmt: skip
            moved = jax.tree.map(lambda p, v: p - now * v, want.parameters, velocity)  # noqa: B023
            want, step = Variables(moved, new), step + 1
        state, mean = jax.jit(functools.partial(programs.epoch, network, recipe))(
            state, architecture, scalars, data.images, data.labels
        )
        np.testing.assert_allclose(mean, np.mean(losses), rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), state.values, want)
    assert len(set(map(frozenset, seen))) == 3 and len(set.union(*seen)) > 250
    assert int(state.step) == 6


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    scalars = Scalars(0, 0.5, 4.0, 10.0)
    rates = [float(learning_rate(scalars, jnp.int32(step))) for step in range(11)]
    np.testing.assert_allclose(rates[:5], [0.125, 0.25, 0.375, 0.5, 0.5])
    assert all(a > b for a, b in pairwise(rates[4:])) and abs(rates[10]) < 1e-7


def test_padding_never_changes_and_does_not_count() -> None:
    evaluator = toy(weight_decay=0.1)
    network, recipe, data = evaluator.network(), evaluator._recipe(), evaluator._data().split()
    architecture = network.encode(job(1).architecture)
    slots = int(architecture.sum())
    assert 0 < slots < SLOTS
    assert evaluator.evaluate(job(1))["parameters"] == slots * (64 + 10)
    state, _ = programs.start(network, recipe, architecture, 0)
    # Values that another architecture has left there.
    full = jax.tree.map(
        lambda a, u: jnp.where(u, a, 3.0), state.values.parameters, network.used(architecture)
    )
    state = programs.fresh(recipe, state.values._replace(parameters=full))
    scalars = Scalars(np.uint32(0), np.float32(0.1), np.float32(0), np.float32(8))
    epoch = jax.jit(functools.partial(programs.epoch, network, recipe))
    after, _ = epoch(state, architecture, scalars, data.images, data.labels)
    for name, used in network.used(architecture).items():
        old, new = full[name], after.values.parameters[name]
        assert ((old != new) == (used > 0))[np.abs(old) > 1e-6].mean() > 0.95
        assert (old == new)[used == 0].all()


def test_validation_counts_each_image_once() -> None:
    network = toy().network()
    architecture = network.encode(job().architecture)
    values = network.init(architecture, jax.random.key(0))
    images = np.random.default_rng(0).normal(size=(601, 8, 8, 1)).astype(np.float32)
    scores, _ = network.apply(architecture, values, images, train=False)
    right = np.argmax(scores, -1)
    labels = np.where(np.arange(601) < 200, right, (right + 1) % 10).astype(np.int32)
    accuracy = programs.validate(network, architecture, values, images, labels)
    np.testing.assert_allclose(accuracy, 200 / 601, rtol=1e-6)


def test_fitness_is_the_mean_of_the_final_epochs(monkeypatch) -> None:
    accuracies = iter([0.1, 0.4, 0.6])
    monkeypatch.setattr("nas.training.loop.Training.accuracy", lambda self: next(accuracies))
    assert toy(epochs=5, final_epochs=3).evaluate(job())["fitness"] == pytest.approx(1.1 / 3)


# --- data -----------------------------------------------------------------------------------------


def test_images_are_split_once_and_in_proportion() -> None:
    split = Data("digits", validation_images=300, examples=500).split()
    assert split.images.shape == (500, 8, 8, 1) and split.held_images.shape == (300, 8, 8, 1)
    rows = np.concatenate([split.images, split.held_images]).reshape(800, -1)
    assert len(np.unique(rows, axis=0)) == 800
    counts = np.bincount(split.held_labels)
    assert counts.min() >= 28 and counts.max() <= 32
    whole = Data("digits").split()
    assert len(whole.images) + len(whole.held_images) == 1437 and whole.classes == 10

    test = np.concatenate([batch["inputs"] for batch in data.digits(64, 0).test()]).reshape(360, -1)
    rows = np.concatenate([whole.images, whole.held_images]).reshape(1437, -1)
    assert len(np.unique(np.concatenate([rows, test]), axis=0)) == 1797


def test_a_file_of_images(tmp_path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    inputs = (rng.normal(size=(200, 6, 6, 2)) + labels[:, None, None, None]).astype(np.float32)
    np.savez(tmp_path / "mine.npz", inputs=inputs, labels=labels)
    evaluator = toy(data=str(tmp_path / "mine.npz"), examples=None, batch_size=32)
    assert evaluator.network().shape.classes == 3
    assert evaluator.evaluate(job())["fitness"] > 0.5
    np.savez(tmp_path / "flat.npz", inputs=inputs.reshape(200, -1), labels=labels)
    with pytest.raises(ValueError, match=r"inputs have the shape \[200, 72\]: .*square images"):
        toy(data=str(tmp_path / "flat.npz"), examples=None).load_data()


def test_another_file_of_the_same_name_is_other_data(tmp_path) -> None:
    """Check it in this process and for a resumed search; a moved file is the same data."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    clear = (rng.normal(size=(200, 6, 6, 1)) + labels[:, None, None, None]).astype(np.float32)
    path, options = tmp_path / "mine.npz", {"examples": None, "batch_size": 32}

    def run(path: Path, inputs: np.ndarray, cycles: int) -> nas.Result:
        np.savez(path, inputs=inputs, labels=labels)
        return search(tmp_path, toy(data=str(path), **options), cycles=cycles)

    best = run(path, clear, 8).best.fitness
    assert run(tmp_path / "moved.npz", clear, 9).counts.results == 9
    noise = rng.normal(size=clear.shape).astype(np.float32)
    with pytest.raises(
        MismatchError, match=r"evaluate.data is 'a file of SHA-256 .*' in the run, 'a f"
    ):
        run(path, noise, 10)
    other = toy(data=str(path), **options)
    assert (other.load_data().images == noise[0]).all((1, 2, 3)).any()
    assert other.evaluate(job())["fitness"] < best - 0.1


def test_a_folder_of_images_is_known_by_its_arrays(tmp_path) -> None:
    evaluator = toy(data=str(tmp_path))
    identities = set()
    for value in (0.0, 1.0):
        np.save(tmp_path / "inputs.npy", np.full((40, 4, 4, 1), value, np.float32))
        np.save(tmp_path / "labels.npy", np.arange(40) % 2)
        identities.add(evaluator.identity["data"])
    assert len(identities) == 2 and evaluator.identity["data"] in identities


def test_scores_that_are_not_finite_are_no_accuracy(monkeypatch) -> None:
    """Also if it was the last step that has ruined the values, whose loss is not known."""
    monkeypatch.setattr(Training, "_epoch", lambda self, number: 1.0)

    def ruin(values):
        return jax.tree.map(lambda a: a * jnp.nan, values)

    monkeypatch.setattr(Training, "values", property(lambda self: ruin(self._state.values)))
    with pytest.raises(FloatingPointError, match=r"image is not finite: .*lower learning_rate"):
        toy().evaluate(job())


def test_augmentation_moves_and_mirrors() -> None:
    image = np.arange(1, 17, dtype=np.float32).reshape(4, 4, 1)
    change = Augmentation(shift=1, flip=True, fill=-1.0)
    changed = np.asarray(change(jnp.tile(image, (400, 1, 1, 1)), jax.random.key(0)))
    expected = set()
    for side in (image, image[:, ::-1]):
        padded = np.pad(side, ((1, 1), (1, 1), (0, 0)), constant_values=-1)
        expected |= {padded[r : r + 4, c : c + 4].tobytes() for r in range(3) for c in range(3)}
    assert {a.tobytes() for a in changed} == expected


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "digit"}, "data: unknown data set 'digit'; did you mean 'digits'?"),
        ({"data": "x"}, "unknown data set 'x'; known: digits, cifar10 or give a .npz file"),
        ({"epochs": 0}, "`epochs` must be a whole number of at least 1, got 0"),
        ({"final_epochs": 4}, "final_epochs 4 is more than epochs 3"),
        ({"learning_rate": math.nan}, "learning_rate nan: expected more than 0"),
        ({"warmup_epochs": 3}, "warmup_epochs 3: expected 0 or more, less than epochs 3"),
        ({"momentum": 1}, "momentum 1: expected 0 or more, less than 1"),
        ({"timeout_s": 0}, "timeout_s 0: expected seconds, more than 0, or None"),
        ({"builder": "dynamic"}, "builder: unknown 'dynamic'; known: interpreter, static"),
        ({"dtype": "float17"}, "dtype: unknown 'float17'; did you mean 'bfloat16'"),
        ({"dtype": "int32"}, "dtype: unknown 'int32'; known: float32, bfloat16"),
        ({"dtype": "float64"}, "dtype: unknown 'float64'; did you mean 'bfloat16'"),
        ({"stop_epoch": 3}, "stop_epoch 3 is not before the end, epochs 3; use 1 to 2"),
    ],
)
def test_bad_settings(options, message) -> None:
    with pytest.raises(ValueError) as error:
        toy(**options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 300}, "batch_size 300 is more than the 256 training images of digits"),
        (
            {"examples": 2000},
            r"examples 2000: digits has 1078 training images besides the 359 h",
        ),
        (
            {"validation_images": 1437},
            "validation_images 1437: digits has 1437 images .* use 1 to 1436",
        ),
        ({"data": "cifar10", "folder": "nowhere"}, "cannot find CIFAR-10: no folder nowhere"),
    ],
)
def test_unfit_data_are_rejected_before_a_search(tmp_path, options, message) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        search(tmp_path, toy(**options))


def test_images_too_small_for_the_cells(tmp_path) -> None:
    inputs, labels = np.zeros((100, 2, 2, 1), np.float32), np.arange(100) % 2
    np.savez(tmp_path / "small.npz", inputs=inputs, labels=labels)
    small = toy(data=str(tmp_path / "small.npz"), examples=None)
    with pytest.raises(ValueError, match="are 2x2, too small for two reduction cells; use images"):
        search(tmp_path, small)


def test_another_space(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"space 'nasbench201': TrainingEvaluator trains cells of"):
        nas.search(space="nasbench201", evaluate=toy(), folder=tmp_path)


def test_spaces_of_genotypes_are_declared(tmp_path) -> None:
    """Accept a space of another class that has all members; two of them are not enough."""

    class OnlyNamed:
        name, pairs, operations = "mine", 2, ("identity",)

    class Own:
        name = "own"

        def __init__(self) -> None:
            self.pairs, self.operations = SMALL_SPACE.pairs, SMALL_SPACE.operations
            self.random, self.mutate = SMALL_SPACE.random, SMALL_SPACE.mutate
            self.encode, self.decode = SMALL_SPACE.encode, SMALL_SPACE.decode
            self.canonical = SMALL_SPACE.canonical

    with pytest.raises(ValueError, match="space 'mine': TrainingEvaluator trains cells of"):
        toy().prepare(OnlyNamed(), tmp_path, "stored", None)
    assert toy().prepare(Own(), tmp_path, "stored", None).pairs == 2


def outcome(evaluator, **options):
    return task.run_job(evaluator, job(**options))


def test_a_loss_that_is_nan_stops_the_training() -> None:
    failure = outcome(toy(epochs=8, learning_rate=1e30, warmup_epochs=0))
    assert failure.kind == "nan"
    assert (
        "in epoch 1 of 8: the training has diverged; use a lower learning_rate than 1e+30"
        in failure.error
    )


def test_training_stops_at_its_time_limit(monkeypatch) -> None:
    toy().evaluate(job())
    failure = outcome(toy(timeout_s=1e-9))
    assert failure.kind == "timeout"
    assert "for 1 of 3 epochs, more than timeout_s 1e-09" in failure.error


@pytest.mark.parametrize(
    ("own", "of_the_search", "limit"),
    [(None, None, None), (9.0, None, 9.0), (None, 5.0, 5.0), (9.0, 5.0, 5.0), (5.0, 9.0, 5.0)],
)
def test_the_shorter_of_two_limits_counts(tmp_path, own, of_the_search, limit) -> None:
    evaluator = toy(timeout_s=own).prepare(nas.NASNetSpace(), tmp_path, "stored", of_the_search)
    assert evaluator.timeout_s == limit


def test_a_device_with_too_little_memory(monkeypatch) -> None:
    monkeypatch.setattr(programs, "memory_of", lambda device: 100_000)
    failure = outcome(toy(batch_size=17))
    assert failure.kind == "out_of_memory"
    assert (
        "KiB; use a smaller batch_size, fewer filters or cells, or dtype bfloat16" in failure.error
    )


def test_a_candidate_that_fails_never_stops_the_search(tmp_path) -> None:
    def evaluate(attempt: nas.Job):
        if attempt.candidate % 3 == 1:
            raise RuntimeError("INTERNAL: something of XLA")
        lr = 1e30 if attempt.candidate % 3 == 2 else 0.05
        return toy(learning_rate=lr, warmup_epochs=0).evaluate(attempt)

    class Some:
        pass

    some = Some()
    some.evaluate = evaluate  # type: ignore[attr-defined]
    result = search(tmp_path, some, cycles=10, cache=False)
    assert result.counts.results == 10 and result.counts.failed >= 10
    assert set(result.reader.failures_by_kind()) == {"exception", "nan"}


# --- another day ----------------------------------------------------------------------------------


def test_search_resumes_with_the_same_training_only(tmp_path) -> None:
    def on(cycles: int, **options) -> nas.Result:
        return search(tmp_path, nas.Repeated(toy(**options), 1), cycles=cycles)

    on(8, epochs=2)
    differences = (
        "evaluate.evaluator.epochs is 2 in the run, 3 here; evaluate.evaluator.momentum is 0.9"
    )
    with pytest.raises(
        MismatchError,
        match=f"with another evaluator, .*: {differences} in the run, 0.5 here; use an",
    ):
        on(9, epochs=3, momentum=0.5)
    with pytest.raises(MismatchError, match=r"evaluate.kind is 'Repeated' in the run, 'ToyEv"):
        search(tmp_path, toy(epochs=2), cycles=9)
    with pytest.raises(MismatchError, match="builder is 'interpreter' in the run, 'static' here"):
        on(9, epochs=2, builder="static")
    aids = {"folder": "x", "timeout_s": 60.0, "compilation_cache": "y"}
    assert on(10, epochs=2, **aids).counts.results == 10
    nas.load("search", tmp_path).resume(evaluate=nas.Repeated(toy(epochs=3), 1), cycles=11)
    with pytest.raises(MismatchError, match=r"is 3 in the run, 2 here.*resume\(evaluate=\.\.\.\)"):
        on(12, epochs=2)
    assert on(12, epochs=3).counts.results == nas.load("search", tmp_path).resume().counts.results


# --- early stopping -------------------------------------------------------------------------------


def test_hopeless_candidates_stop_also_after_a_resume(tmp_path) -> None:
    evaluator = toy(epochs=4, stop_epoch=1, stop_quantile=0.5)
    whole = search(tmp_path, evaluator, name="whole", workers=1)
    history = whole.history[whole.history["answered_by"].isna()]  # cached results repeat others
    stopped = history[history["stopped_at_epoch"] == 1]
    assert 3 <= len(stopped) <= 18
    for number, row in stopped.iterrows():
        rivals = whole.reader.rivals(number, "rung_accuracy")
        assert len(rivals) >= 2 and row.fitness == row.rung_accuracy < np.quantile(rivals, 0.5)
    went_on = history[history["stopped_at_epoch"].isna()]
    for number, row in went_on.iterrows():
        rivals = whole.reader.rivals(number, "rung_accuracy")
        assert len(rivals) < 2 or row.rung_accuracy >= np.quantile(rivals, 0.5)

    count = iter(range(1000))
    search(tmp_path, evaluator, name="parts", callback=lambda _: next(count) % 5 == 4)
    while nas.load("parts", tmp_path).counts.results < 24:
        nas.load("parts", tmp_path).resume(callback=lambda _: next(count) % 5 == 4)
    assert trace(nas.load("parts", tmp_path)) == trace(whole)


def test_by_default_nothing_is_stopped(tmp_path) -> None:
    result = search(tmp_path, cycles=10)
    assert not {"stopped_at_epoch", "rung_accuracy"} & set(result.history)


def test_every_data_set_has_a_source() -> None:
    assert tuple(datasets._SOURCES) == DATASETS


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"data": 3}, "data 3: expected a data set, or the path of a file"),
        ({"data": ""}, "data '': expected a data set, or the path of a file"),
        ({"folder": 3}, "folder 3: expected a path, or None"),
        ({"compilation_cache": 3}, "compilation_cache 3: expected a path, or None"),
        ({"operations": 3}, "operations 3: expected a tuple of the space's operations"),
    ],
)
def test_arguments_of_other_types(options, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        toy(**options)


def test_numbers_of_numpy_are_those_of_python() -> None:
    options = {"learning_rate": np.float32(0.5), "warmup_epochs": np.int64(1)}
    assert toy(**options).identity == toy(learning_rate=0.5, warmup_epochs=1).identity
