"""Check that a pipeline equals the plain sequential program, in value and in every gradient.

This is the central test. The reference is one device, one batch, all layers in order. Batches have
unequal weights and are three examples short of a full batch, so padding is always under test. The
whole grid runs with `-m slow`. By default a diagonal runs. It has every value of K, D, M and
schedule, and every D and schedule with every network.
"""

import functools
import itertools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import NETWORKS, assert_trees_close, make_batch, network, reference

import gpipe_jax as gpipe
from gpipe_jax import sequential
from gpipe_jax.layers import random_keys
from gpipe_jax.pipeline import executor, remat
from gpipe_jax.pipeline.ragged.storage import Storage
from gpipe_jax.pipeline.state import State
from gpipe_jax.schedules.buffers import BufferTable
from gpipe_jax.schedules.schedule import BACKWARD, FORWARD


@pytest.fixture(autouse=True)
def unroll_short_runs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan the longer runs of the small Transformer, to test both forms of a run."""
    monkeypatch.setattr(remat, "MAX_UNROLL", 2)


SLOW = pytest.mark.slow
FULL, PRESENT = 48, 45
GRID = list(itertools.product((1, 2, 4, 8), (1, 2), (1, 2, 3, 4, 8), ("gpipe", "1f1b")))
# The tests compile hundreds of programs that run for milliseconds.
QUICK = {"xla_backend_optimization_level": 0}


DIAGONAL = {
    ("transformer", 2, 1, 8, "gpipe"),
    ("transformer", 4, 2, 1, "1f1b"),
    ("transformer", 8, 2, 2, "1f1b"),
    ("convnet", 1, 2, 4, "1f1b"),
    ("convnet", 4, 1, 3, "gpipe"),
    ("convnet", 8, 2, 2, "1f1b"),
    ("pytree_mlp", 1, 2, 4, "1f1b"),
    ("pytree_mlp", 2, 1, 8, "gpipe"),
}


def grid(fast: set[tuple]) -> list:
    cases = [(name, *case) for name, case in itertools.product(NETWORKS, GRID)]
    return [pytest.param(*case, marks=() if case in fast else SLOW) for case in cases]


def test_the_default_has_every_value() -> None:
    """Check every value of K, D, M and schedule; every D and schedule with every network."""
    for i, values in enumerate(((1, 2, 4, 8), (1, 2), (1, 2, 3, 4, 8), ("gpipe", "1f1b")), 1):
        assert {case[i] for case in DIAGONAL} == set(values)
    for i in (2, 4):
        assert len({(case[0], case[i]) for case in DIAGONAL}) == 2 * len(NETWORKS)
    assert {case[1:] for case in DIAGONAL} <= set(GRID)


def present(batch: dict) -> dict:
    return {name: a[:PRESENT] for name, a in batch.items()}


@functools.cache
def cached_reference(name: str, double: bool) -> tuple:
    with jax.enable_x64(double):
        return reference(network(name), present(make_batch(name, FULL)))


@functools.cache
def reference_of_all(name: str, examples: int) -> tuple:
    return reference(network(name), make_batch(name, examples))


@functools.cache
def reference_with_dropout(rate: float) -> tuple:
    layers = helpers.transformer(dropout=rate)
    return reference(layers, make_batch("transformer", 16), micro_batches=4)


def make_pipeline(
    name: str, K: int, D: int, M: int, kind: str | gpipe.schedules.Schedule, **kwargs: object
) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        network(name, **kwargs),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=K, data=D),
        micro_batches=M,
        schedule=kind,
        example=make_batch(name, FULL),
    )


def expected_permutes(pipe: gpipe.Pipeline) -> int:
    """Count one for each encoded array and direction, in each segment of ticks that sends it."""
    operation = pipe.schedule.table[..., 0]
    has = [(operation == op).any(axis=1) for op in (FORWARD, BACKWARD)]
    first_b, last_f = np.argmax(has[1]), len(has[0]) - np.argmax(has[0][::-1])
    stretches = [range(0, first_b), range(first_b, last_f), range(last_f, len(operation))]
    encoded = (
        len(pipe.stages.boundary_format.shapes),
        len(pipe.stages.boundary_format.gradient_shapes),
    )
    sent = [operation[:, :-1] == FORWARD, operation[:, 1:] == BACKWARD]
    return sum(
        arrays * bool(sends[list(ticks)].any())
        for ticks in stretches
        for arrays, sends in zip(encoded, sent, strict=True)
        if len(ticks)
    )


def check(pipe: gpipe.Pipeline, name: str, double: bool, tolerance: float) -> None:
    params, loss, metrics, grads = cached_reference(name, double)
    lowered = pipe.lower()
    # The mechanism: K programs' worth of branches that talk by permutes, and nothing else.
    text = lowered.as_text()
    assert text.count("stablehlo.collective_permute") == expected_permutes(pipe)
    assert (expected_permutes(pipe) > 0) == (pipe.stages.geometry.last > 0)
    assert text.count("stablehlo.while") >= 1 or pipe.micro_batches == 1
    step = lowered.compile(compiler_options=QUICK)
    state = pipe.from_layers(params, seed=1)
    micro_batched = pipe.split(present(make_batch(name, FULL)))
    (our_loss, our_metrics), our_grads, _ = step(state, micro_batched, jnp.uint32(0))
    if double:
        assert {a.dtype for a in jax.tree.leaves((our_loss, our_grads))} == {jnp.dtype("float64")}
    assert_trees_close((our_loss, our_metrics), (loss, metrics), tolerance)
    assert_trees_close(pipe.to_layers(our_grads), grads, tolerance)


@pytest.mark.parametrize(("name", "K", "D", "M", "kind"), grid(DIAGONAL))
def test_equivalence_float32(name: str, K: int, D: int, M: int, kind: str) -> None:
    check(make_pipeline(name, K, D, M, kind), name, double=False, tolerance=1e-5)


@pytest.mark.parametrize(
    ("name", "K", "D", "M", "kind"), grid({(name, 8, 1, 4, "gpipe") for name in NETWORKS})
)
def test_equivalence_float64(name: str, K: int, D: int, M: int, kind: str) -> None:
    with jax.enable_x64(True):
        check(make_pipeline(name, K, D, M, kind), name, double=True, tolerance=1e-12)


@pytest.mark.parametrize(
    ("name", "K", "M", "kind"),
    [
        *(("pytree_mlp", 8, 5, kind) for kind in ("gpipe", "eager_1f1b")),
        ("convnet", 4, 3, "1f1b"),
        pytest.param("pytree_mlp", 8, 5, "1f1b", marks=SLOW),
        *(pytest.param("convnet", 4, 3, kind, marks=SLOW) for kind in ("gpipe", "eager_1f1b")),
    ],
)
def test_equivalence_with_nan_in_idle_buffers(name: str, K: int, M: int, kind: str) -> None:
    """Check that no gradient depends on what an idle slot holds or sends."""
    example = make_batch(name, 30)
    pipe = gpipe.Pipeline(
        NETWORKS[name](),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=K, data=2),
        micro_batches=M,
        schedule=kind,
        example=example,
    )
    params, loss, metrics, grads = reference_of_all(name, 30)
    step = jax.jit(functools.partial(pipe.gradients, idle_fill=float("nan")))
    lowered = step.lower(pipe.from_layers(params, 1), pipe.split(example), jnp.uint32(0))
    assert "0x7FC00000" in lowered.as_text(), "no NaN was put in"
    result = lowered.compile(compiler_options=QUICK)(
        pipe.from_layers(params, 1), pipe.split(example), jnp.uint32(0)
    )
    assert_trees_close(tuple(result[0]), (loss, metrics), 1e-5)
    assert_trees_close(pipe.to_layers(result[1]), grads, 1e-5)


def test_nan_would_be_seen_if_an_idle_buffer_were_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the NaN test itself: reading one stale stash slot gives NaN."""
    lower = executor.lower

    def stale(schedule: gpipe.schedules.Schedule) -> BufferTable:
        rows = lower(schedule)
        return rows._replace(
            x_slot=(rows.x_slot + 1) % (rows.x_slots + 1), x_slots=rows.x_slots + 1
        )

    monkeypatch.setattr(executor, "lower", stale)
    pipe = make_pipeline("pytree_mlp", 2, 1, 4, "1f1b")
    params = cached_reference("pytree_mlp", False)[0]
    step = jax.jit(functools.partial(pipe.gradients, idle_fill=float("nan")))
    batch = pipe.split(make_batch("pytree_mlp", FULL))
    _, grads, _ = step(pipe.from_layers(params, 1), batch, jnp.uint32(0))
    assert not all(np.isfinite(a).all() for a in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ("K", "D", "M", "kind"),
    [
        pytest.param(1, 1, 4, "gpipe", marks=SLOW),
        pytest.param(2, 2, 2, "1f1b", marks=SLOW),
        # test_semantics has dropout with this schedule and number of devices.
        pytest.param(4, 1, 4, "gpipe", marks=SLOW),
        (8, 2, 2, "1f1b"),
    ],
)
def test_equivalence_with_dropout(K: int, D: int, M: int, kind: str) -> None:
    """Check that forward and recomputation have the same masks, for any cut with equal M."""
    batch = make_batch("transformer", 16)
    params, loss, metrics, grads = reference_with_dropout(0.3)
    assert abs(loss - reference_with_dropout(0.0)[1]) > 1e-3, "dropout did nothing"
    pipe = gpipe.Pipeline(
        helpers.transformer(dropout=0.3),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=K, data=D),
        micro_batches=M,
        schedule=kind,
        example=batch,
    )
    state = pipe.from_layers(params, seed=1)
    result, our_grads, _ = pipe.value_and_grad(state, batch, step=0)
    assert_trees_close(tuple(result), (loss, metrics), 1e-5)
    assert_trees_close(pipe.to_layers(our_grads), grads, 1e-5)
    other = pipe.value_and_grad(state, batch, step=1)[0][0]
    assert abs(float(other) - loss) > 1e-4, "another step has the same masks"


@pytest.mark.parametrize(("K", "D", "M", "kind"), [(5, 2, 3, "1f1b"), (2, 1, 2, "gpipe")])
def test_equivalence_of_unusual_layers(K: int, D: int, M: int, kind: str) -> None:
    batch = make_batch("pytree_mlp", 12)
    with jax.enable_x64(True):
        params, loss, metrics, grads = reference(helpers.unusual(), batch)
        pipe = gpipe.Pipeline(
            helpers.unusual(),
            loss=gpipe.losses.softmax_cross_entropy,
            mesh=gpipe.make_mesh(stages=K, data=D),
            micro_batches=M,
            schedule=kind,
            example=batch,
        )
        result, our_grads, _ = pipe.value_and_grad(pipe.from_layers(params, 1), batch)
        assert_trees_close(tuple(result), (loss, metrics), 1e-12)
        assert_trees_close(pipe.to_layers(our_grads), grads, 1e-12)


def test_equivalence_of_a_recurrent_module() -> None:
    """Check `nnx.RNN`, which loops from a state of zeros."""
    batch = make_batch("pytree_mlp", 8)
    batch["inputs"] = np.random.default_rng(0).normal(size=(8, 5, 3))
    layers = [gpipe.layer(Recurrent, features=3)] * 2 + [gpipe.layer(Scores)]
    params, stats = sequential.init(layers, jnp.asarray(batch["inputs"], jnp.float32))
    step = sequential.value_and_grad(layers, gpipe.losses.softmax_cross_entropy)
    arrays = jax.tree.map(jnp.asarray, {**batch, "inputs": batch["inputs"].astype(np.float32)})
    expected, grads, _ = jax.jit(step)(params, stats, arrays, random_keys.step_key(0, 0))
    pipe = gpipe.Pipeline(
        layers,
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=3, data=2),
        micro_batches=2,
        example=batch,
    )
    result, our_grads, _ = pipe.value_and_grad(pipe.from_layers(params), batch)
    assert_trees_close(tuple(result), jax.device_get(expected), 1e-5)
    assert_trees_close(pipe.to_layers(our_grads), jax.device_get(grads), 1e-5)


class Recurrent(nnx.Module):
    def __init__(self, features: int, *, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.GRUCell(features, features, rngs=rngs), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.rnn(x)


class Scores(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x[:, -1])


@pytest.mark.parametrize(
    "name",
    # The default has `pytree_mlp` under this schedule with NaN in idle buffers.
    ["transformer", "convnet", pytest.param("pytree_mlp", marks=SLOW)],
)
@pytest.mark.parametrize(("K", "D", "M"), [pytest.param(2, 2, 8, marks=SLOW), (4, 1, 3)])
def test_equivalence_of_the_eager_schedule(name: str, K: int, D: int, M: int) -> None:
    check(make_pipeline(name, K, D, M, "eager_1f1b"), name, double=False, tolerance=1e-5)


def test_equivalence_of_an_own_table() -> None:
    """Check a valid table with the micro-batches in reverse."""
    table = gpipe.schedules.gpipe(2, 3).table.copy()
    table[..., 1] = np.where(table[..., 0] > 0, 2 - table[..., 1], 0)
    reverse = gpipe.schedules.Schedule("reversed", table)
    check(
        make_pipeline("pytree_mlp", 2, 1, 3, reverse),
        "pytree_mlp",
        double=False,
        tolerance=1e-5,
    )


def test_equivalence_of_outputs_has_no_dropout() -> None:
    layers, batch = helpers.transformer(dropout=0.5), make_batch("transformer", 8)
    pipe = gpipe.Pipeline(
        layers,
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2),
        micro_batches=2,
        example=batch,
    )
    state = pipe.init(0)
    inputs = jnp.asarray(batch["inputs"])
    params = pipe.to_layers(state)
    none = [{}] * len(layers)
    plain, _ = sequential.forward(layers, params, none, inputs, jax.random.key(0), train=False)
    assert_trees_close(pipe.predict(state, inputs), np.asarray(plain), 1e-5)


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize(
    ("K", "D", "M"),
    [pytest.param(1, 1, 1, marks=SLOW), pytest.param(8, 1, 2, marks=SLOW), (4, 2, 3)],
)
def test_equivalence_of_outputs_and_evaluation(name: str, K: int, D: int, M: int) -> None:
    """Check `apply` and `evaluate`, which use the forward-only schedule, with any count."""
    params, loss, metrics, _ = cached_reference(name, False)
    batch = make_batch(name, FULL)
    pipe = make_pipeline(name, K, D, M, "1f1b")
    state = pipe.from_layers(params)
    inputs = np.concatenate([batch["inputs"], batch["inputs"][:7]])
    plain, _ = sequential.forward(
        pipe.layers,
        params,
        [{}] * len(params),
        jnp.asarray(inputs),
        jax.random.key(0),
        train=False,
    )
    assert_trees_close(pipe.predict(state, inputs), np.asarray(plain), 1e-5)
    assert_trees_close(tuple(pipe.evaluate(state, present(batch))), (loss, metrics), 1e-5)


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("pytree_mlp", [(1, 1), (3, 2), (8, 1)]),
        ("transformer", [(3, 2)]),
        pytest.param("convnet", [(3, 2)], marks=SLOW),
    ],
)
def test_equivalence_of_initial_parameters_for_every_cut(name: str, cuts: list[tuple]) -> None:
    inputs = jnp.asarray(make_batch(name, FULL)["inputs"])
    plain, _ = sequential.init(network(name), inputs[:1], seed=3)
    for K, D in cuts:
        pipe = make_pipeline(name, K, D, 2, "gpipe")
        assert_trees_close(pipe.to_layers(pipe.init(seed=3)), jax.device_get(plain), 1e-6)


def test_from_layers_is_the_inverse_of_to_layers() -> None:
    for name in NETWORKS:
        params = cached_reference(name, False)[0]
        pipe = make_pipeline(name, 4, 2, 2, "gpipe")
        again = pipe.to_layers(pipe.from_layers(params))
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("faulty", ["drop a micro-batch", "flip a sign", "swap two layers"])
def test_equivalence_would_see_a_fault(faulty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "pytree_mlp"
    if faulty == "drop a micro-batch":
        split = gpipe.Pipeline.split

        def without_one(self: gpipe.Pipeline, batch: dict) -> dict:
            micro_batched = split(self, batch)
            return {**micro_batched, "weights": micro_batched["weights"].at[1].set(0)}

        monkeypatch.setattr(gpipe.Pipeline, "split", without_one)
    elif faulty == "flip a sign":
        add = Storage.add
        monkeypatch.setattr(
            Storage, "add", lambda *args: add(*args[:-1], jax.tree.map(jnp.negative, args[-1]))
        )
    else:
        from_layers = gpipe.Pipeline.from_layers

        def swapped(self: gpipe.Pipeline, trees: list, seed: int = 0) -> State:
            return from_layers(self, [*trees[:2], trees[3], trees[2], *trees[4:]], seed)

        monkeypatch.setattr(gpipe.Pipeline, "from_layers", swapped)
    with pytest.raises(AssertionError, match="relative error"):
        check(make_pipeline(name, 4, 1, 4, "1f1b"), name, double=False, tolerance=1e-5)


@pytest.mark.parametrize("remat", ["stage", "layer"])
def test_equivalence_of_each_remat_policy(remat: str) -> None:
    params, loss, metrics, grads = cached_reference("transformer", False)
    pipe = gpipe.Pipeline(
        NETWORKS["transformer"](),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2),
        micro_batches=2,
        example=make_batch("transformer", FULL),
        remat=remat,
    )
    batch = present(make_batch("transformer", FULL))
    state = pipe.from_layers(params, 1)
    result, our_grads, _ = pipe.value_and_grad(state, batch)
    assert_trees_close(tuple(result), (loss, metrics), 1e-5)
    assert_trees_close(pipe.to_layers(our_grads), grads, 1e-5)
