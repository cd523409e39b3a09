"""Extras: what layers read beside their input, on their own device, with gradients on request."""

from collections.abc import Sequence
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from helpers import assert_trees_close

import gpipe_jax as gpipe
from gpipe_jax import sequential
from gpipe_jax.layers import random_keys
from gpipe_jax.pipeline.batches import checks, micro_batches
from gpipe_jax.planner import programs
from gpipe_jax.utils.trees import PyTree

WIDTH, CLASSES = 6, 3


class Block(nnx.Module):
    """Mix the positions that a mask allows, and add a condition, one of a tree of two."""

    def __init__(self, norm: bool = False, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs) if norm else None

    def __call__(self, x: jax.Array, *, mask: jax.Array, condition: dict) -> jax.Array:
        scores = jnp.where(mask, x @ x.swapaxes(1, 2), -30.0)
        y = self.linear(jax.nn.softmax(scores) @ x) * condition["scale"][:, None]
        y = y if self.norm is None else self.norm(y)
        return x + jnp.tanh(y + condition["shift"][:, None])


class Head(nnx.Module):
    """Return scores of the mean over positions; the condition is read here too."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array, *, condition: dict) -> jax.Array:
        return self.linear(x.mean(1) + condition["shift"])


def network(norm: bool = False, blocks: int = 4) -> list[gpipe.Layer]:
    block = gpipe.layer(Block, norm=norm).read("mask", "condition")
    stem = gpipe.layer(nnx.Linear, in_features=4, out_features=WIDTH)
    return helpers.widened([stem, *[block] * blocks, gpipe.layer(Head).read("condition")])


def make_batch(examples: int, length: int = 5, dtype: Any = np.float64) -> dict:
    rng = np.random.default_rng(0)
    condition = {
        "scale": rng.normal(size=(examples, WIDTH)).astype(dtype),
        "shift": rng.normal(size=(examples, WIDTH)).astype(dtype),
    }
    return {
        "inputs": rng.normal(size=(examples, length, 4)),
        "labels": rng.integers(0, CLASSES, examples),
        "extras": {"mask": rng.random((examples, length, length)) < 0.7, "condition": condition},
    }


def pipeline(
    layers: Sequence[gpipe.Layer], batch: dict, K: int = 2, D: int = 1, V: int = 1, **kwargs: Any
) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        layers,
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=K, data=D),
        example=batch,
        chunks=V,
        **{"micro_batches": 4, **kwargs},
    )


def expected(layers: Sequence[gpipe.Layer], batch: dict, rows: Any, D: int = 1) -> tuple:
    """Return what the sequential program returns, with the gradients of the condition.

    `rows` are the examples of a full batch, of which those behind the batch have weight 0.
    """
    count = len(batch["labels"])
    weights = jnp.where(jnp.arange(len(rows)) < count, 1.0, 0.0)
    step = sequential.value_and_grad(layers, gpipe.losses.softmax_cross_entropy, 4, replicas=D)
    params, stats = sequential.init(layers, batch["inputs"], 1, extras=batch["extras"])

    def loss(condition: PyTree) -> tuple:
        given = {**batch, "extras": {**batch["extras"], "condition": condition}}
        full = jax.tree.map(lambda a: jnp.asarray(a)[rows], given)
        value, *rest = step(params, stats, {**full, "weights": weights}, random_keys.step_key(1, 0))
        return value[0], rest

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (grads, stats)), of_condition = run(batch["extras"]["condition"])
    return jax.tree.map(np.asarray, (params, value, grads, stats, of_condition))


@pytest.mark.parametrize(
    ("K", "D", "V", "schedule", "remat", "norm"),
    [
        (2, 2, 1, "1f1b", "stage", True),
        (2, 1, 2, "interleaved", "layer", False),
        pytest.param(1, 1, 1, "gpipe", "stage", False, marks=pytest.mark.slow),
        pytest.param(4, 2, 1, "eager_1f1b", "stage", True, marks=pytest.mark.slow),
        pytest.param(3, 1, 1, "gpipe", "layer", True, marks=pytest.mark.slow),
    ],
)
def test_values_and_all_gradients_are_exact(
    K: int, D: int, V: int, schedule: str, remat: str, norm: bool
) -> None:
    with jax.enable_x64(True):
        batch, layers = make_batch(16), network(norm)
        params, loss, grads, stats, of_condition = expected(layers, batch, jnp.arange(16), D)
        pipe = pipeline(layers, batch, K, D, V, schedule=schedule, remat=remat)
        state = pipe.init(seed=1)
        assert_trees_close(pipe.to_layers(state), params, 1e-12)
        result = pipe.value_and_grad_with_extras(state, batch, ["condition"])
        np.testing.assert_allclose(result.value.loss, loss, rtol=1e-12)
        assert_trees_close(pipe.to_layers(result.gradients), grads, 1e-12)
        assert_trees_close(pipe.statistics(result.state), stats, 1e-12)
        assert_trees_close(result.extras, {"condition": of_condition}, 1e-12)
        # What passes between stages has no extras.
        [passed] = {a.shape for a in jax.tree.leaves(pipe.stages.geometry.input(1))}
        assert passed == (4 // D, 5, WIDTH)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_extras_in_a_short_batch(norm: bool) -> None:
    """Batch norm counts the rows of padding, which repeat the batch: their gradients are added."""
    with jax.enable_x64(True):
        batch, layers = make_batch(10), network(norm, blocks=2)
        *_, of_condition = expected(layers, batch, jnp.arange(16) % 10)
        pipe = pipeline(layers, make_batch(16))
        result = pipe.value_and_grad_with_extras(pipe.init(seed=1), batch, ["condition"])
        assert_trees_close(result.extras, {"condition": of_condition}, 1e-12)


def test_an_example_of_weight_zero_has_no_gradient_whatever_its_extras_hold() -> None:
    batch, layers = make_batch(8, dtype=np.float32), network(blocks=2)
    batch["weights"] = np.array([0, 1, 1, 1, 0, 1, 1, 1])
    pipe = pipeline(layers, batch)
    state = pipe.init(seed=1)
    first = pipe.value_and_grad_with_extras(state, batch, ["condition"])
    batch["extras"]["condition"]["shift"][[0, 4]] = np.nan
    without = pipe.value_and_grad(state, batch)
    assert_trees_close(pipe.to_layers(without.gradients), pipe.to_layers(first.gradients), 1e-5)
    second = pipe.value_and_grad_with_extras(state, batch, ["condition"])
    assert_trees_close(second.extras, first.extras, 0)
    gradient = second.extras["condition"]["shift"]
    assert not gradient[np.array([0, 4])].any() and gradient[np.array([1, 5])].all()


def test_gradients_of_extras_are_summed_in_float32_whatever_the_stages() -> None:
    """Ten equal layers are one loop in one stage, and two layers each in five."""

    def apply(params: PyTree, x: jax.Array, *, shift: jax.Array) -> jax.Array:
        return x + params * jnp.tanh(shift.astype(x.dtype) * x)

    layer = gpipe.layer(lambda key, x: jax.random.normal(key, (4,)), apply).read("shift")
    rng = np.random.default_rng(0)
    batch = {
        "inputs": rng.normal(size=(8, 4)).astype(np.float32),
        "labels": np.zeros(8, int),
        "extras": {"shift": jnp.asarray(rng.normal(size=(8, 4)), jnp.bfloat16)},
    }
    results = []
    for K in (1, 5):
        pipe = pipeline([layer] * 10, batch, K)
        assert pipe.stages.geometry.runs[0][0].scanned == (K == 1)
        results.append(pipe.value_and_grad_with_extras(pipe.init(0), batch, ["shift"]).extras)
    assert results[0]["shift"].dtype == np.float32
    # A cotangent of each layer is rounded to bfloat16, its sum is not.
    assert_trees_close(results[0], results[1], 1e-6)


def test_predict_takes_extras_of_other_lengths_and_any_number() -> None:
    layers = network(blocks=2)
    batch = make_batch(8, dtype=np.float32)
    pipe = pipeline(layers, batch)
    state = pipe.init(seed=1)
    for examples, length in ((3, 5), (19, 7)):
        new = make_batch(examples, length, dtype=np.float32)
        got = pipe.predict(state, new["inputs"], new["extras"])
        y, _ = sequential.forward(
            layers,
            pipe.to_layers(state),
            pipe.statistics(state),
            jnp.asarray(new["inputs"], jnp.float32),
            jax.random.key(0),
            train=False,
            extras=new["extras"],
        )
        assert_trees_close(got, y, 1e-5)
    larger = make_batch(11, dtype=np.float32)
    loss, _ = pipe.evaluate(state, larger)
    assert np.isfinite(loss) and loss != pipe.evaluate(state, batch).loss


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        return x + linen.Dense(x.shape[-1])(jnp.where(mask, x, 0.0))


def test_linen_modules_instances_and_data_sets_read_extras() -> None:
    block = gpipe.layer(LinenBlock()).read("mask")
    head = gpipe.layer(nnx.Linear(4, CLASSES, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    examples = {
        "inputs": rng.normal(size=(32, 4)).astype(np.float32),
        "labels": rng.integers(0, CLASSES, 32),
        "extras": {"mask": rng.random((32, 4)) < 0.5},
    }

    def gather(index: np.ndarray) -> dict:
        return jax.tree.map(lambda a: a[index], examples)

    dataset = gpipe.data.dataset("mine", 8, 0, (gather, 32), (gather, 32))
    rows = next(dataset.train(2, np.array([1, 3])))
    np.testing.assert_array_equal(
        rows["extras"]["mask"], next(dataset.train(2))["extras"]["mask"][[1, 3]]
    )
    pipe = pipeline([block, block, head], next(dataset.train(0)))
    trainer = gpipe.Trainer(pipe, optax.adam(0.01))
    before = pipe.evaluate(trainer.init(0).state, examples).loss
    current = trainer.fit(trainer.init(0), dataset.train(0), steps=30)
    assert pipe.evaluate(current.state, examples).loss < 0.9 * before


def test_a_plan_counts_the_extras() -> None:
    batch = make_batch(16, dtype=np.float32)
    pipe = pipeline(network(), batch)
    small = {**batch, "extras": {**batch["extras"], "mask": np.ones((16, 1, 1), bool)}}
    more = pipe.device_bytes()["batch"] - pipeline(network(), small).device_bytes()["batch"]
    assert more == 16 * 24  # of the mask's 25 elements, one byte each
    exported = programs.of_stages(pipe)
    assert {str(branch) for branch in exported} == {
        "forward 0", "forward 1", "backward 0", "backward 1",
    }  # fmt: skip


class Plain(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


PLAIN = {"inputs": np.zeros((4, 4), np.float32), "labels": np.zeros(4, int)}


@pytest.mark.parametrize(
    ("layer", "extras", "message"),
    [
        (
            gpipe.layer(Plain).read("mask"),
            {},
            r"layer 0, Plain\(\) \[read mask\], reads 'mask', but the example has no extras; put "
            r"an array for each example into example\['extras'\]\['mask'\]",
        ),
        (
            gpipe.layer(Plain).read("maks"),
            {"mask": np.ones((4, 1))},
            r"but the example has 'mask'; .*; did you mean 'mask'\?",
        ),
        (
            gpipe.layer(Plain),
            {"mask": np.ones((4, 1))},
            r"no layer reads example\['extras'\]\['mask'\]; write `.read\('mask'\)`",
        ),
        (
            gpipe.layer(Plain).read("mask"),
            {"mask": np.ones((4, 1), np.float32)},
            r"layer 0, .* does not take the network's inputs: .*, with the extras .*"
            r"unexpected keyword argument 'mask'",
        ),
        (
            gpipe.layer(Plain).read("mask"),
            np.ones((4, 1)),
            r"batch\['extras'\] must be a dict from names to arrays, got a ndarray; write",
        ),
        (
            gpipe.layer(Plain).read("mask"),
            {"mask": np.ones((1, 4))},
            r"example\['extras'\]\['mask'\] has shape \[1, 4\], but the batch has 4 examples",
        ),
    ],
)
def test_wrong_extras_are_refused(layer: gpipe.Layer, extras: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline([layer], {**PLAIN, "extras": extras}, K=1, micro_batches=1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mask"], r"`extras` has 'mask', bool\[16,5,5\]; only arrays of floating-point numbers"),
        (["noise"], r"must be a list of names .*, got \['noise'\]; they are 'condition', 'mask'"),
        ("mask", r"must be a list of names of the example's extras, got 'mask'"),
    ],
)
def test_wrong_names_of_gradients_are_refused(names: Any, message: str) -> None:
    example = micro_batches.shapes_of(make_batch(16), 1, 1)
    with pytest.raises(gpipe.errors.ArgumentError, match=message):
        checks.differentiable_extras(names, example)


def test_a_batch_with_other_extras_is_refused() -> None:
    batch = make_batch(8, dtype=np.float32)
    pipe = pipeline(network(blocks=1), batch)
    state, mask = pipe.init(), batch["extras"]["mask"]
    with pytest.raises(gpipe.errors.DataError, match=r"missing \['condition'\], unknown \[\]"):
        pipe.value_and_grad(state, {**batch, "extras": {"mask": mask}})
    with pytest.raises(gpipe.errors.DataError, match="differ in the number of examples"):
        pipe.predict(state, batch["inputs"][:3], batch["extras"])
    message = r"missing \['condition', 'mask'\], .*predict\(state, inputs, extras\)"
    with pytest.raises(gpipe.errors.DataError, match=message):
        pipe.predict(state, batch["inputs"])
