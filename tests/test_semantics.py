"""Check that stages do not change batch norm, dropout, skips and tied weights, in any schedule.

The network of `linked.all_links` has all of them at once; it is compared with the sequential
program over the same micro-batches after three steps, leaf by leaf.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import linked
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_trees_close, widened
from linked import CLASSES, QUICK

import gpipe_jax as gpipe
from gpipe_jax import sequential
from gpipe_jax.layers import random_keys
from gpipe_jax.pipeline.device_step import DeviceStep
from gpipe_jax.pipeline.ragged.ties import Ties

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("eager_1f1b", 1), ("interleaved", 1), ("interleaved", 2)]
STEPS, COUNT = 3, 32
GRID = [(K, D, *s) for K, D, s in itertools.product((1, 2, 4), (1, 2), SCHEDULES)]
# A diagonal: every schedule, every K and D; the first two in float64, the others in float32.
FAST = [
    (2, 2, "interleaved", 2),
    (4, 1, "1f1b", 1),
    (1, 2, "interleaved", 1),
    (4, 2, "gpipe", 1),
    (2, 1, "eager_1f1b", 1),
]
CROSS_ENTROPY = gpipe.losses.softmax_cross_entropy


def batches(count: int = STEPS) -> list[dict]:
    return [linked.make_batch(COUNT, i) for i in range(count)]


@functools.cache
def expected(double: bool, M: int = 4, D: int = 1, axis: str | None = None) -> tuple:
    """Return the results of the sequential program for the batches in 4 micro-batches."""
    with jax.enable_x64(double):
        layers = widened(linked.all_links(axis=axis))
        return linked.run_sequential(layers, batches(), M=M, D=D, steps=4)


def make(K: int, D: int, M: int, kind: str = "1f1b", V: int = 1, **options: Any) -> gpipe.Pipeline:
    layers = options.pop("layers", None) or linked.all_links(axis=options.pop("axis", None))
    return gpipe.Pipeline(
        widened(layers),
        loss=CROSS_ENTROPY,
        mesh=gpipe.make_mesh(stages=K, data=D),
        micro_batches=M,
        schedule=kind,
        chunks=V,
        example=linked.make_batch(COUNT),
        steps=4,
        **options,
    )


def run(pipe: gpipe.Pipeline, params: Any, data: list[dict], **options: Any) -> tuple:
    """Return ((loss, metrics), grads, statistics) of the last step, by layer."""
    state, result, grads = pipe.from_layers(params, 1), None, None
    gradients = jax.jit(functools.partial(pipe.gradients, **options))
    lowered = gradients.lower(state, pipe.split(data[0]), jnp.uint32(0))
    step = lowered.compile(compiler_options=QUICK)
    for i, batch in enumerate(data):
        result, grads, stats = step(state, pipe.split(batch), jnp.uint32(i))
        state = state._replace(stats=stats)
    assert result is not None
    return tuple(result), pipe.to_layers(grads), pipe.statistics(state)


def check(pipe: gpipe.Pipeline, reference: tuple, tolerance: float, **options: Any) -> None:
    params, _, result, grads, stats = reference
    our_result, our_grads, our_stats = run(pipe, params, batches(), **options)
    assert_trees_close(our_result, result, tolerance)
    assert_trees_close(our_grads, grads, tolerance)
    assert_trees_close(our_stats, stats, min(tolerance, 1e-6))


def marked(fast: list) -> list:
    return [pytest.param(*c, marks=() if c in fast else pytest.mark.slow) for c in GRID]


@pytest.mark.parametrize(("K", "D", "kind", "V"), marked(FAST[2:]))
def test_batch_norm_dropout_skip_tied_float32(K: int, D: int, kind: str, V: int) -> None:
    pipe = make(K, D, 4 // D, kind, V)
    assert len(pipe.stages.geometry.layer_ranges) == K * V
    check(pipe, expected(False), 1e-5)


@pytest.mark.parametrize(("K", "D", "kind", "V"), marked(FAST[:2]))
def test_batch_norm_dropout_skip_tied_float64(K: int, D: int, kind: str, V: int) -> None:
    with jax.enable_x64(True):
        check(make(K, D, 4 // D, kind, V), expected(True), 1e-12)


@pytest.mark.parametrize(("K", "M"), [(4, 3), pytest.param(2, 5, marks=pytest.mark.slow)])
def test_interleaved_takes_any_number_of_micro_batches(K: int, M: int) -> None:
    """Check fewer micro-batches than devices, and no multiple of them; with NaN where idle."""
    data = [linked.make_batch(8 * M)]
    params, _, result, grads, _ = linked.run_sequential(linked.all_links(), data, M=M, D=1)
    pipe = gpipe.Pipeline(
        linked.all_links(),
        loss=CROSS_ENTROPY,
        mesh=gpipe.make_mesh(stages=K),
        micro_batches=M,
        schedule="interleaved",
        chunks=3,
        example=data[0],
    )
    assert len(pipe.stages.geometry.layer_ranges) == 3 * K
    our_result, our_grads, _ = run(pipe, params, data, idle_fill=float("nan"))
    assert_trees_close(our_result, result, 1e-5)
    assert_trees_close(our_grads, grads, 1e-5)


@pytest.mark.parametrize(("K", "D"), [(2, 2), pytest.param(1, 4, marks=pytest.mark.slow)])
def test_batch_norm_over_replicas(K: int, D: int) -> None:
    """Check layers that name the data axis: they normalize all replicas together."""
    together = expected(False, 4 // D, D, "data")
    apart = expected(False)
    assert abs(float(together[2][0]) - float(apart[2][0])) > 1e-3
    check(make(K, D, 4 // D, axis="data"), together, 1e-5)


def test_batch_norm_evaluates_with_the_running_statistics() -> None:
    params, fresh, _, _, stats = expected(False)
    pipe, batch = make(2, 1, 4), linked.make_batch(COUNT)
    inputs = jnp.asarray(batch["inputs"], jnp.float32)
    outputs = {}
    for name, used in (("fresh", fresh), ("running", stats)):
        plain, _ = sequential.forward(
            pipe.layers, params, used, inputs, jax.random.key(0), train=False
        )
        state = pipe.from_layers(params, statistics=used)
        outputs[name] = pipe.predict(state, inputs)
        assert_trees_close(outputs[name], np.asarray(plain), 1e-5)
    assert np.abs(outputs["fresh"] - outputs["running"]).max() > 0.01


def test_batch_norm_statistics_are_those_of_the_whole_mini_batch() -> None:
    """Check mean and variance after one step: over all examples, not over micro-batches."""

    class Bare(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.norm = nnx.BatchNorm(CLASSES, momentum=0.75, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.norm(x)

    batch = linked.make_batch(COUNT)
    batch["inputs"] = batch["inputs"] + 5.0
    pipe = make(1, 2, 4, layers=[gpipe.layer(Bare)])
    _, _, state = pipe.value_and_grad(pipe.init(0), batch)
    (stats,) = pipe.statistics(state)
    x = batch["inputs"]
    np.testing.assert_allclose(stats["norm"]["mean"], 0.25 * x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(stats["norm"]["var"], 0.75 + 0.25 * x.var(0), rtol=1e-5)


@pytest.mark.parametrize(
    ("K", "D", "M"), [pytest.param(1, 1, 1, marks=pytest.mark.slow), (2, 2, 2), (4, 1, 8)]
)
def test_dropout_keyed_per_example_is_independent_of_the_micro_batches(
    K: int, D: int, M: int
) -> None:
    reference = expected_without_norm("example", 1)
    options = {"layers": linked.without_norm(), "keys_per": "example"}
    check(make(K, D, M, **options), reference, 1e-5)


def test_dropout_keyed_per_micro_batch_depends_on_them() -> None:
    losses = [float(expected_without_norm("micro_batch", M)[2][0]) for M in (1, 4)]
    assert abs(losses[0] - losses[1]) > 1e-3


@functools.cache
def expected_without_norm(keys_per: str, M: int) -> tuple:
    layers = linked.without_norm()
    return linked.run_sequential(layers, batches(), M=M, D=1, keys_per=keys_per, steps=4)


def test_dropout_follows_the_progress_of_training() -> None:
    """Check that the dropout rate is 0 in step 0 of 4, and grows."""
    params, batch = expected(False)[0], linked.make_batch(COUNT)
    plain = make(2, 1, 4, layers=linked.all_links(rate=0.0))
    without = float(run(plain, params, [batch])[0][0])
    pipe = make(2, 1, 4)
    state = pipe.from_layers(params, 1)
    first, last = (float(pipe.value_and_grad(state, batch, step=n)[0][0]) for n in (0, 2))
    assert first == pytest.approx(without, rel=1e-6)
    assert abs(last - without) > 1e-3


def test_skip_costs_no_recomputation_in_the_stages_that_it_crosses() -> None:
    """Count the sine in the skip and its derivative: no more than without crossing."""
    layers = [gpipe.layer(linked.Stem).tie("table", "table"), gpipe.layer(linked.Keep).stash("a")]
    layers += [gpipe.layer(linked.Normed)] * 3
    layers += [gpipe.layer(linked.Use).pop("a"), gpipe.layer(linked.Head).tie("table", "table")]
    crossed = make(6, 1, 4, "gpipe", layers=layers, partition=(2, 3, 4, 5, 6))
    assert [len(crossed.stages.geometry.passing(s)) for s in range(6)] == [0, 1, 1, 1, 0, 0]
    whole = make(2, 1, 4, "gpipe", layers=layers, partition=(6,))
    texts = [pipe.lower().as_text() for pipe in (crossed, whole)]
    for operation in ("stablehlo.sine", "stablehlo.cosine"):
        count, as_often = (text.count(operation) for text in texts)
        assert 1 <= count <= as_often
    # It travels with the boundary: a permute for floats and one for integers, these only forward.
    assert texts[0].count("stablehlo.collective_permute") == 2 + 1


@pytest.mark.parametrize(("K", "V"), [(1, 1), pytest.param(4, 1, marks=pytest.mark.slow), (2, 2)])
def test_tied_parameter_is_one_for_the_optimizer(K: int, V: int) -> None:
    """Check that clipping by the global norm, momentum, weight decay and counts see it once."""
    tx = optax.chain(optax.clip_by_global_norm(0.1), optax.trace(0.9), optax.scale(-0.5))
    pipe = make(K, 1, 4, "interleaved", V)
    trainer = gpipe.Trainer(pipe, tx)
    current = trainer.start(pipe.from_layers(expected(False)[0], 1))
    params, stats = expected(False)[:2]
    optimizer = tx.init(params)
    step = jax.jit(sequential.value_and_grad(pipe.layers, CROSS_ENTROPY, 4))
    for i, batch in enumerate(batches()):
        current, _ = trainer.step(current, batch)
        arrays = jax.tree.map(jnp.asarray, batch)
        _, grads, stats = step(params, stats, arrays, random_keys.step_key(1, i), i / 4)
        updates, optimizer = tx.update(grads, optimizer)
        params = optax.apply_updates(params, updates)
    ours = trainer.to_layers(current)
    ours = [ours.layers[i]["params"] for i in range(len(params))]
    assert ours[-1]["table"] is None and ours[0]["table"] is not None
    assert_trees_close(ours, jax.device_get(params), 1e-5)
    sizes = [a.size for a in jax.tree.leaves(ours)]
    assert gpipe.count_parameters(pipe.layers, linked.make_batch(1)["inputs"]) == sum(sizes)


def test_tied_parameter_crosses_devices_once_each_way() -> None:
    """Count one sum over stages before the ticks, and one of its gradient after them."""
    free = [dataclasses.replace(a, ties=()) for a in linked.all_links()]

    def sums(pipe: gpipe.Pipeline) -> int:
        """Count the all-reduces, without those over replicas: gradients and moments, each array."""
        held = [s.local_shapes() for s in (*pipe.stages.params, *pipe.stages.stats)]
        return pipe.lower().as_text().count("stablehlo.all_reduce") - len(jax.tree.leaves(held))

    assert sums(make(4, 1, 4)) == sums(make(4, 1, 4, layers=free)) + 2


@pytest.mark.parametrize(
    ("K", "D", "kind", "V"),
    [
        pytest.param(2, 1, "1f1b", 1, marks=pytest.mark.slow),
        pytest.param(4, 1, "gpipe", 1, marks=pytest.mark.slow),
        pytest.param(8, 1, "1f1b", 1, marks=pytest.mark.slow),
        (2, 2, "interleaved", 2),
    ],
)
def test_losses_of_fifty_steps_with_batch_norm_dropout_skip_and_tied(
    K: int, D: int, kind: str, V: int
) -> None:
    whole = losses_of_fifty_steps(1, 1, "gpipe", 1)
    assert whole[-1] < 0.9 * whole[0]
    np.testing.assert_allclose(losses_of_fifty_steps(K, D, kind, V), whole, rtol=1e-5)


@functools.cache
def losses_of_fifty_steps(K: int, D: int, kind: str, V: int) -> np.ndarray:
    pipe = make(K, D, 4 // D, kind, V)
    trainer = gpipe.Trainer(pipe, optax.sgd(0.02, momentum=0.9), ema=0.9)
    current, losses = trainer.init(0), []
    for _ in range(50):
        current, metrics = trainer.step(current, linked.make_batch(COUNT))
        losses.append(float(metrics["loss"]))
    held_out, _ = pipe.evaluate(trainer.evaluated(current), linked.make_batch(COUNT, 9))
    return np.asarray([*losses, float(held_out)])


FAULTS = {
    "moments of a recomputation counted too": "relative error",
    "gradient of a tied parameter forgotten": "relative error",
    "gradient of a crossing skip forgotten": "relative error",
    "key of a tick": "relative error",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_batch_norm_skip_tied_dropout_faults_are_seen(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = DeviceStep
    if fault.startswith("moments"):
        backward = device._backward

        def counted_again(self: Any, *args: Any) -> Any:
            work = backward(self, *args)
            again = jax.tree.map(lambda a: 1.5 * a, work.sums.moments)
            return work._replace(sums=work.sums._replace(moments=again))

        monkeypatch.setattr(device, "_backward", counted_again)
    elif "tied" in fault:
        monkeypatch.setattr(Ties, "add", lambda self, grads, shared: grads)
    elif "skip" in fault:
        gradient = device._gradient

        def forgets(self: Any, s: int, *args: Any) -> Any:
            tree = gradient(self, s, *args)
            passing = self.stages.geometry.passing(s)
            zero = {
                n: jax.tree.map(lambda a, n=n: a * (n not in passing), t)
                for n, t in tree.skips.items()
            }
            return tree._replace(skips=zero)

        monkeypatch.setattr(device, "_gradient", forgets)
    else:
        stage = device._stage

        def ticks(self: Any, s: int, entry: Any) -> Any:
            return stage(self, s, entry._replace(micro_batch=entry.micro_batch + s))

        monkeypatch.setattr(device, "_stage", ticks)
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check(make(4, 1, 4), expected(False), 1e-5)
