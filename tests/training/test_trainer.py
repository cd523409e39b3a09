"""Check training: the same losses for every K, donated buffers, the queue, and failures."""

import functools
import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax.checkpoint.by_layer import LayerTrees
from gpipe_jax.config.optimizers import AdamConfig
from gpipe_jax.errors import ArgumentError, DataError, DivergedError
from gpipe_jax.pipeline.state import State, TrainState
from gpipe_jax.training import optimizers
from gpipe_jax.training.fitting.steps_in_flight import IN_FLIGHT
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils.trees import same_shapes

EXAMPLES = 12


def dense_init(width: int, key: jax.Array, x: jax.Array) -> dict:
    return {
        "w": jax.random.normal(key, (x.shape[-1], width)) / x.shape[-1] ** 0.5,
        "b": jax.random.normal(key, (width,)) / 10,
    }


def dense_apply(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"])


def ten_layers() -> list[gpipe.Layer]:
    widths = (6, 6, 6, 6, 9, 9, 4, 4, 5, 4)
    inits = {width: functools.partial(dense_init, width) for width in widths}
    return [gpipe.layer(inits[width], dense_apply) for width in widths]


def make_batches(start: int = 0, size: int = EXAMPLES):
    for step in itertools.count(start):
        rng = np.random.default_rng(step)
        inputs = rng.normal(size=(size, 3)).astype(np.float32)
        yield {"inputs": inputs, "labels": (inputs.sum(1) > 0).astype(np.int32) * 3}


def make_trainer(K: int, tx=None, loss=gpipe.losses.softmax_cross_entropy) -> Trainer:
    pipe = gpipe.Pipeline(
        ten_layers(),
        loss=loss,
        mesh=gpipe.make_mesh(stages=K),
        example=next(make_batches()),
        micro_batches=2,
    )
    config = AdamConfig(learning_rate=0.003, weight_decay=0.1, clip_norm=0.5, schedule="constant")
    return Trainer(pipe, optimizers.build(config, 1000) if tx is None else tx)


class Made(dict):
    """Hold values that are made when they are first asked for."""

    def __init__(self, make) -> None:
        self._make = make

    def __missing__(self, K: int) -> Any:
        return self.setdefault(K, self._make(K))


@pytest.fixture(scope="module")
def trainers() -> dict[int, Trainer]:
    return Made(make_trainer)


@pytest.fixture(scope="module")
def fresh(trainers) -> LayerTrees:
    """Return the state that all tests start from, layer by layer."""
    trainer = trainers[2]
    current = trainer.init(seed=3)
    saved = trainer.to_layers(current)
    trainer.step(current, next(make_batches()))  # compiled for what `init` returns
    return saved


def params_of(saved: LayerTrees) -> list:
    return [saved.layers[i]["params"] for i in range(len(saved.layers))]


def fit(trainer: Trainer, current, steps: int, batches=None):
    records: list[dict] = []
    batches = make_batches(current.step) if batches is None else batches
    return trainer.fit(current, batches, steps, records.append), records


def losses(records: list[dict]) -> np.ndarray:
    return np.array([r["loss"] for r in records])


def plain_losses(params: list, batch: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return loss and accuracy of each example, in numpy."""
    x = batch["inputs"].astype(np.float64)
    for p in params:
        x = np.tanh(x @ p["w"] + p["b"])
    chosen = x[np.arange(len(x)), batch["labels"]]
    return np.log(np.exp(x).sum(1)) - chosen, x.argmax(1) == batch["labels"]


# --- the same training for every K ---------------------------------------------------------------


@pytest.fixture(scope="module")
def fifty(trainers, fresh):
    """Return for each K the state after 20 steps, layer by layer, and the records of 50 steps."""

    def train(K: int) -> tuple:
        middle, first = fit(trainers[K], trainers[K].from_layers(fresh, 0), 20)
        saved = trainers[K].to_layers(middle)
        return saved, [*first, *fit(trainers[K], middle, 50)[1]]

    return Made(train)


@pytest.mark.parametrize("K", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_fifty_losses_do_not_depend_on_the_number_of_stages(fifty, K):
    single, several = losses(fifty[1][1]), losses(fifty[K][1])
    assert len(single) == 50 and single[-5:].mean() < 0.8 * single[:5].mean(), "it must learn"
    np.testing.assert_allclose(several, single, rtol=1e-5)


@pytest.mark.parametrize(
    ("before", "after"),
    [(1, 4), (4, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 8), (8, 2)))],
)
def test_a_saved_state_continues_on_another_number_of_stages(trainers, fifty, before, after):
    saved, records = fifty[before]
    current = trainers[after].from_layers(saved, 20)
    _, resumed = fit(trainers[after], current, 25)
    assert [r["step"] for r in resumed] == [21, 22, 23, 24, 25]
    np.testing.assert_allclose(losses(resumed), losses(records[20:25]), rtol=1e-6)


def test_layers_roundtrip_exactly(trainers, fifty):
    saved = fifty[4][0]
    again = trainers[4].to_layers(trainers[4].from_layers(saved, 20))
    jax.tree.map(np.testing.assert_array_equal, again, saved)
    assert int(saved.common["seed"]) == 3 and sorted(saved.layers) == list(range(10))


def test_layer_shapes_are_those_of_the_layers(trainers, fifty):
    shapes = trainers[2].layer_shapes()
    assert jax.tree.structure(shapes) == jax.tree.structure(fifty[2][0])
    have = jax.tree.map(lambda a: (a.shape, a.dtype), fifty[2][0])
    assert have == jax.tree.map(lambda a: (a.shape, a.dtype), shapes)


def test_weight_decay_skips_vectors_in_every_form(fresh):
    """Check that a step without gradient halves matrices, and leaves vectors as they are."""
    tx = optax.chain(optax.scale(0.0), optimizers.weight_decay(1.0), optax.scale(-0.5))
    trainer = make_trainer(4, tx=tx)
    current = trainer.start(trainer.pipe.from_layers(params_of(fresh)))
    current, _ = trainer.step(current, next(make_batches()))
    for old, new in zip(params_of(fresh), trainer.pipe.to_layers(current.state), strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(b, a * (0.5 if a.ndim > 1 else 1.0)), old, new
        )


def test_weight_decay_needs_no_array_of_the_parameters_size():
    """Check that decay needs one byte for each packed number, and one number for a slot."""
    pipe = gpipe.Pipeline(
        gpipe.zoo.mlp((64, 256, 128, 96, 32)),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2),
        example={"inputs": np.zeros((2, 64), np.float32), "labels": np.zeros(2, np.int32)},
    )
    with_decay, without = (
        Trainer(pipe, optimizers.build(AdamConfig(weight_decay=rate), 10)).lower().compile()
        for rate in (0.1, 0.0)
    )
    local = [storage.local_shapes() for storage in pipe.stages.params]
    packed = sum(a.size for arrays in local for a in arrays["packs"])
    held = sum(a.size for a in jax.tree.leaves(local))
    more, less = (step.memory_analysis().temp_size_in_bytes for step in (with_decay, without))
    assert 0 < packed < held and more - less <= packed + 1000 < held


# --- the step ------------------------------------------------------------------------------------


def test_the_old_state_is_given_up(trainers, fresh):
    trainer = trainers[2]
    current = trainer.from_layers(fresh, 0)
    old = [current.state.params, current.opt_state]
    arrays = [a for a in jax.tree.leaves(old) if a.size > 1]
    trainer.step(current, next(make_batches()))
    assert arrays and all(a.is_deleted() for a in arrays)


def test_parameters_and_optimizer_share_their_buffers_with_the_result(trainers, fresh):
    trainer = trainers[2]
    current = trainer.from_layers(fresh, 0)
    micro_batched = trainer.pipe.split(next(make_batches()))
    lowered = trainer.train_step.program.lower(current.arrays, micro_batched, jnp.uint32(0))
    text = lowered.compile().as_text()
    aliases = text.split("input_output_alias=")[1].split("\n")[0].count("may-alias")
    assert aliases >= len(jax.tree.leaves((current.state.params, current.opt_state)))


def test_one_compilation_of_the_step(trainers, fresh, fifty):
    """Check states from `init` and from saved layers, and a full and a ragged batch."""
    trainer, (saved, _) = trainers[2], fifty[2]
    batches = iter([next(make_batches(size=5)), next(make_batches())])
    fit(trainer, trainer.from_layers(saved, 20), 22, batches)
    assert trainer.train_step.program._cache_size() == 1


@pytest.mark.parametrize("K", [1, 4])
def test_a_ragged_batch_is_the_mean_over_its_examples(trainers, fresh, K):
    batch = next(make_batches(size=5))
    expected = plain_losses(params_of(fresh), batch)[0].mean()
    _, metrics = trainers[K].step(trainers[K].from_layers(fresh, 0), batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_an_optimizer_that_depends_on_the_cut_is_refused():
    with pytest.raises(ValueError, match="depends on how parameters are grouped"):
        make_trainer(2, tx=optax.adafactor(1e-3))


@pytest.mark.parametrize("ema", [0, 1.0, 2.0, -0.5])
def test_a_decay_outside_its_range_is_refused(trainers, ema):
    message = f"`ema` must be more than 0 and less than 1, got {ema}"
    with pytest.raises(ArgumentError, match=message):
        Trainer(trainers[1].pipe, optax.sgd(0.1), ema=ema)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.adam, r"got function; call it, as adam\(1e-3\)"),
        (
            1e-3,
            r"got float; give an optimizer with this .* such as optax.adam\(0.001\)",
        ),
        (
            nnx.Optimizer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param),
            "got Optimizer; give the transformation that it holds, its `tx`",
        ),
        ("adam", r"got str; give one, such as optax.adam\(1e-3\)"),
    ],
)
def test_what_is_no_transformation_is_refused(trainers, tx, message):
    with pytest.raises(ArgumentError, match=f"`tx` must be an optax transformation, {message}"):
        Trainer(trainers[1].pipe, tx)


# --- the queue -----------------------------------------------------------------------------------


def not_started() -> TrainState:
    """Return a state without arrays, for a step that is replaced."""
    nothing: Any = None
    return TrainState(State(nothing, nothing, nothing, nothing), None, 0)


class Waited:
    """Note when somebody waits for this loss."""

    def __init__(self, log: list, step: int, value: float = 1.0) -> None:
        self.log, self.step, self.value = log, step, value

    def __float__(self) -> float:
        self.log.append(("waited", self.step))
        return self.value


def without_devices(monkeypatch, trainer: Trainer, values=None) -> list:
    """Replace the step by one that only logs its start."""
    log: list = []

    def step(current, batch):
        log.append(("started", current.step + 1))
        value = 1.0 if values is None else values[current.step]
        metrics = {"loss": Waited(log, current.step + 1, value)}
        return current._replace(step=current.step + 1), metrics

    monkeypatch.setattr(trainer, "step", step)
    monkeypatch.setattr(trainer.train_step, "check", lambda current: None)
    return log


def test_at_most_eight_steps_are_under_way(trainers, monkeypatch):
    trainer = trainers[1]
    current = not_started()
    log = without_devices(monkeypatch, trainer)
    _, records = fit(trainer, current, 30)
    under_way = np.cumsum([1 if what == "started" else -1 for what, _ in log])
    assert under_way.max() == IN_FLIGHT == 8
    assert under_way[-1] == 0
    assert [r["step"] for r in records] == list(range(1, 31))


def test_step_times_add_up_also_where_the_host_is_slower(trainers, monkeypatch):
    """Check steps that finish before anyone waits: each takes at least the time to start it."""
    trainer = trainers[1]
    current = not_started()
    without_devices(monkeypatch, trainer)
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    _, records = fit(trainer, current, 5)
    assert all(r["step_time_s"] >= 1 for r in records)


def test_batches_that_end_are_an_error(trainers, monkeypatch):
    trainer = trainers[1]
    without_devices(monkeypatch, trainer)
    with pytest.raises(DataError, match="`batches` ended after 2 of 5 steps"):
        fit(trainer, not_started(), 5, itertools.islice(make_batches(), 2))


def unreadable():
    yield from itertools.islice(make_batches(), 3)
    raise OSError("no such disk")


BAD_BATCHES = {
    "they end": (lambda: itertools.islice(make_batches(), 3), "`batches` ended after 3 of 5"),
    "cannot be read": (unreadable, "no such disk"),
    "another shape": (
        lambda: itertools.chain(itertools.islice(make_batches(), 3), make_batches(0, EXAMPLES + 1)),
        "only the number of examples may differ",
    ),
}


@pytest.mark.parametrize(("batches", "message"), BAD_BATCHES.values(), ids=BAD_BATCHES)
def test_the_completed_steps_are_not_lost(trainers, fresh, batches, message):
    """Continue from the state that an error left; the steps in flight are recorded too."""
    trainer, records = trainers[2], []
    start = trainer.from_layers(fresh, 0)
    with pytest.raises((DataError, OSError), match=message) as error:
        trainer.fit(start, batches(), 5, records.append)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert error.value.__notes__ == [
        "(the state after step 3 is kept; in Python: `trainer.reached`)"
    ]
    assert trainer.reached.step == 3
    ended, more = fit(trainer, trainer.reached, 5, make_batches(3))
    assert trainer.reached is None
    expected, all_records = fit(trainer, trainer.from_layers(fresh, 0), 5)
    np.testing.assert_array_equal(losses(records + more), losses(all_records))
    jax.tree.map(
        np.testing.assert_array_equal, *map(params_of, map(trainer.to_layers, (ended, expected)))
    )


def test_an_interrupt_loses_nothing(trainers, fresh):
    def interrupted():
        yield from itertools.islice(make_batches(), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(trainers[2], trainers[2].from_layers(fresh, 0), 5, interrupted())
    assert trainers[2].reached.step == 2


def test_a_divergence_before_a_bad_batch_is_what_is_reported(trainers, monkeypatch):
    without_devices(monkeypatch, trainers[1], [1.0, float("nan")])
    with pytest.raises(DivergedError, match="nan at step 2"):
        fit(trainers[1], not_started(), 5, itertools.islice(make_batches(), 2))
    assert trainers[1].reached is None


# --- divergence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_training(trainers, monkeypatch, bad):
    trainer = trainers[1]
    current = not_started()
    without_devices(monkeypatch, trainer, [2.0, 1.25, bad, 1.0, 1.0])
    message = f"loss became {bad} at step 3 .*finite loss was 1.25.*lower optimizer.learning_rate"
    with pytest.raises(DivergedError, match=message):
        fit(trainer, current, 5)


def test_the_last_good_loss_is_known_across_calls(trainers, monkeypatch):
    trainer = trainers[1]
    current = not_started()
    without_devices(monkeypatch, trainer, [2.0, 1.5, float("nan")])
    current, _ = fit(trainer, current, 2)
    with pytest.raises(DivergedError, match=r"at step 3 \(the last finite loss was 1.5\)"):
        fit(trainer, current, 3)


def test_a_first_step_that_diverges_says_so(trainers, monkeypatch):
    trainer = trainers[1]
    monkeypatch.setattr(trainer.divergence, "last_loss", float("nan"))
    without_devices(monkeypatch, trainer, [float("nan"), 1.0])
    with pytest.raises(DivergedError, match=r"nan at step 1 \(there was no step before it"):
        fit(trainer, not_started(), 2)


@pytest.mark.parametrize(
    ("steps", "when"),
    [pytest.param(1, "in step 1", marks=pytest.mark.slow), (3, "in one of steps 1 to 3")],
)
def test_a_state_that_is_not_finite_ends_training(steps, when):
    """Find a gradient that is not finite, although the loss of its step is."""
    trainer = make_trainer(2, loss=steep_at_label_1)
    batches = list(itertools.islice(make_batches(), steps))
    batches[-1]["labels"][0] = 1
    with pytest.raises(DivergedError, match=rf"layer 0, .* {when}, though each loss was finite"):
        fit(trainer, trainer.init(0), steps, iter(batches))
    assert trainer.reached is None


def test_padding_is_no_part_of_the_state():
    """Let an optimizer without an epsilon divide zero by zero where there are no parameters."""
    trainer = make_trainer(4, optax.adam(0.003, eps=0))
    current, _ = fit(trainer, trainer.init(0), 2)
    assert any(jnp.isnan(a).any() for a in jax.tree.leaves(current.arrays.state.params))
    assert trainer.is_finite(current)


def steep_at_label_1(outputs, labels):
    """Return losses of infinite slope, times zero, for examples with the label 1."""
    steep = jnp.sqrt(jnp.where(labels[:, None] == 1, 0 * outputs**2, 1)).sum(-1)
    return gpipe.losses.softmax_cross_entropy(outputs, labels)[0] + steep


# --- evaluation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(12, 12, 5), (3,), (12,), (1, 1)])
def test_evaluation_is_the_mean_over_all_examples(trainers, fresh, sizes):
    trainer = trainers[4]
    state = trainer.pipe.from_layers(params_of(fresh))
    batches = [next(make_batches(i, size)) for i, size in enumerate(sizes)]
    figures = trainer.evaluate(state, iter(batches))
    each = [plain_losses(params_of(fresh), batch) for batch in batches]
    loss, accuracy = (np.concatenate(values).mean() for values in zip(*each, strict=True))
    assert figures == {
        "test_loss": pytest.approx(loss, rel=1e-5),
        "test_accuracy": pytest.approx(accuracy, abs=1e-6),
    }


def test_evaluation_weighs_the_examples(trainers, fresh):
    trainer = trainers[4]
    rng = np.random.default_rng(0)
    batches = [next(make_batches(i, size)) for i, size in enumerate((12, 5))]
    batches = [{**b, "weights": rng.uniform(0.1, 5.0, len(b["labels"]))} for b in batches]
    figures = trainer.evaluate(trainer.pipe.from_layers(params_of(fresh)), iter(batches))
    each = [plain_losses(params_of(fresh), batch)[0] for batch in batches]
    expected = np.average(
        np.concatenate(each), weights=np.concatenate([b["weights"] for b in batches])
    )
    assert figures["test_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_batch_in_place_of_batches_is_refused(trainers, fresh):
    state = trainers[1].from_layers(fresh, step=0).state
    with pytest.raises(ValueError, match=r"`batches` is a dict; give a list of batches: \[batch\]"):
        trainers[1].evaluate(state, next(make_batches(0, 8)))


def test_nothing_to_evaluate_is_an_error(trainers, fresh):
    state = trainers[1].from_layers(fresh, step=0).state
    with pytest.raises(ValueError, match="nothing to evaluate"):
        trainers[1].evaluate(state, iter([]))


# --- the moving average, statistics and progress -------------------------------------------------


class Normed(nnx.Module):
    """Apply linear without bias, batch norm, and tanh."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.75, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.norm(self.linear(x)))


def averaging(K: int, *, ema: float | None = 0.6, **options) -> Trainer:
    """Return a trainer with batch norms, a matrix tied in two layers, and a moving average."""
    tied = gpipe.layer(Normed).tie("w", "linear.kernel")
    normed = gpipe.layer(Normed)
    pipe = gpipe.Pipeline(
        [tied, normed, normed, tied, normed],
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=K),
        example=regression(0),
        micro_batches=2,
        cost=[1, 1, 1, 1, 1],
        **options,
    )
    return Trainer(pipe, optax.sgd(0.5, momentum=0.9), ema=ema)


def regression(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "inputs": rng.normal(1.0, 2.0, (EXAMPLES, 3)).astype(np.float32),
        "labels": rng.normal(size=(EXAMPLES, 3)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def averaged() -> tuple:
    """Return the trainer, the state after five steps, and the parameters after 0 to 5 steps."""
    trainer = averaging(2)
    current = trainer.init(seed=1)
    seen = [trainer.pipe.to_layers(current.state)]
    for step in range(5):
        current, _ = trainer.step(current, regression(step))
        seen.append(trainer.pipe.to_layers(current.state))
    return trainer, current, seen


def test_evaluated_are_the_averages_of_the_parameters(averaged):
    """Check a <- d a + (1 - d) p with d = min(0.6, (1 + t) / (10 + t)), t updates before it."""
    trainer, current, seen = averaged
    expected = seen[0]
    for t, params in enumerate(seen[1:]):
        d = min(0.6, (1 + t) / (10 + t))
        expected = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * p, expected, params)
    evaluated = trainer.evaluated(current)
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(assert_close, trainer.pipe.to_layers(evaluated), expected)
    assert not np.allclose(expected[1]["linear"]["kernel"], seen[-1][1]["linear"]["kernel"], 1e-2)
    assert evaluated.stats is current.state.stats and evaluated.seed is current.state.seed


def test_what_is_evaluated_has_the_parameters_type(averaged):
    trainer, current, _ = averaged
    evaluated = trainer.evaluated(current)
    assert same_shapes(evaluated.params, current.state.params)
    assert {a.dtype for a in jax.tree.leaves(current.average)} == {jnp.dtype("float32")}


def test_without_an_average_the_parameters_themselves_are_evaluated(trainers, fresh):
    current = trainers[1].from_layers(fresh, 0)
    assert current.average is None
    assert trainers[1].evaluated(current) is current.state


def test_the_average_starts_as_the_parameters_and_is_given_up_too(averaged):
    trainer, *_ = averaged
    current = trainer.init(seed=1)
    jax.tree.map(np.testing.assert_array_equal, current.average, current.state.params)
    old = jax.tree.leaves((current.state.params, current.state.stats, current.average))
    trainer.step(current, regression(0))
    assert all(a.is_deleted() for a in old)
    assert trainer.train_step.program._cache_size() == 1


def test_statistics_move_with_every_step(averaged):
    """Check that statistics move, and that evaluation uses them."""
    trainer, current, _ = averaged
    stats = trainer.pipe.statistics(current.state)
    fresh = trainer.pipe.statistics(trainer.init(seed=1).state)
    for new, old in zip(stats, fresh, strict=True):
        assert np.abs(new["norm"]["mean"] - old["norm"]["mean"]).max() > 1e-3
        assert np.abs(new["norm"]["var"] - old["norm"]["var"]).max() > 1e-3
    params = trainer.pipe.to_layers(current.state)
    losses = [
        trainer.evaluate(trainer.pipe.from_layers(params, statistics=s), iter([regression(9)]))[
            "test_loss"
        ]
        for s in (stats, fresh)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize(
    ("K", "options"), [(1, {}), (5, {}), (2, {"schedule": "interleaved", "chunks": 2})]
)
def test_averages_and_statistics_are_the_same_bits_for_every_cut(averaged, K, options):
    trainer, current, _ = averaged
    saved = trainer.to_layers(current)
    other = averaging(K, **options)
    moved = other.from_layers(saved, 5)
    assert moved.step == 5
    again = other.to_layers(moved)
    assert jax.tree.structure(again) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, again, saved)
    shapes = other.layer_shapes()
    assert jax.tree.structure(shapes) == jax.tree.structure(saved)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), saved
    )
    last = saved.layers[3]
    assert last["statistics"]["norm"]["mean"].any() and sorted(saved.layers) == list(range(5))
    assert last["average"]["linear"]["kernel"] is None, "kept by the first layer of that name"


def test_a_saved_average_goes_on_elsewhere(averaged):
    trainer, current, _ = averaged
    saved, other = trainer.to_layers(current), averaging(5)
    moved, metrics_moved = other.step(other.from_layers(saved, 5), regression(5))
    stayed, metrics_stayed = trainer.step(trainer.from_layers(saved, 5), regression(5))
    assert float(metrics_moved["loss"]) == pytest.approx(float(metrics_stayed["loss"]), rel=1e-5)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, other.to_layers(moved), trainer.to_layers(stayed))


@pytest.mark.parametrize(
    ("steps", "expected"), [(4, [0.0, 0.25, 0.5, 1.0, 1.0]), (None, [1.0] * 5)]
)
def test_the_progress_of_training_is_the_share_of_steps_done(steps, expected):
    """Check also that it is 1 from the end on, in evaluation, and without a length."""
    progressing = gpipe.layer(lambda key, x: {}, lambda params, x, progress: 0 * x + progress)
    same = gpipe.layer(lambda key, x: {}, lambda params, x: x)
    batch = {"inputs": np.zeros((4, 1), np.float32), "labels": np.zeros((4, 1), np.float32)}
    pipe = gpipe.Pipeline(
        [same, progressing],
        loss=lambda outputs, labels: outputs,
        mesh=gpipe.make_mesh(stages=2),
        example=batch,
        micro_batches=2,
        steps=steps,
    )
    state = pipe.init(0)
    progress = [float(pipe.value_and_grad(state, batch, step)[0][0]) for step in (0, 1, 2, 4, 9)]
    assert progress == expected
    assert float(pipe.evaluate(state, batch)[0]) == 1.0
