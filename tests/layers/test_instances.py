"""Take nnx instances as layers: each starts with its values, and equal ones share one run."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax import sequential
from gpipe_jax.layers.sources.describe import layer

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
BATCH = {"inputs": X, "labels": X}


class Table(nnx.Variable):
    """Hold what is not trained."""


class Block(nnx.Module):
    """Hold parameters, statistics, a random stream, and constants in two ways."""

    def __init__(self, rate: float = 0.0, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.table = Table(jnp.arange(6.0) / 10)
        self.mask = jnp.arange(6) > 1
        self.sizes = [1, 2]  # a list cannot be hashed

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.dropout(jnp.tanh(self.norm(self.linear(x)))) + self.table[...]
        return jnp.where(self.mask, x, 0)


def blocks(count: int) -> list[Block]:
    """Return blocks of different values; also their statistics differ."""
    made = [Block(rngs=nnx.Rngs(seed)) for seed in range(count)]
    for i, block in enumerate(made):
        block.norm.mean[...] = jnp.full(6, i / 10)
    return made


def build(layers: list, stages: int, replicas: int = 1, **options: Any) -> gpipe.Pipeline:
    """Return a pipeline of two micro-batches."""
    return gpipe.Pipeline(
        layers,
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=stages, data=replicas),
        example=BATCH,
        micro_batches=2,
        **options,
    )


def test_equal_instances_make_equal_layers_with_values_of_their_own() -> None:
    first, second = map(layer, blocks(2))
    assert first == second and hash(first) == hash(second)
    assert not np.array_equal(
        *(one.init(jax.random.key(0), X)["linear"]["kernel"] for one in (first, second))
    )
    other = blocks(1)[0]
    other.table[...] = jnp.zeros(6)
    assert layer(other) != first  # its constants differ
    assert layer(Block(0.5, rngs=nnx.Rngs(0))) != first


@pytest.mark.parametrize(("stages", "replicas"), [(1, 1), (2, 2), (3, 1)])
def test_every_layer_of_a_run_starts_with_its_own_values(stages: int, replicas: int) -> None:
    modules = blocks(6)
    pipe = build([layer(block) for block in modules], stages, replicas)
    assert any(run.count > 1 for runs in pipe.stages.geometry.runs for run in runs)
    state = pipe.init(seed=3)
    for block, params, stats in zip(
        modules, pipe.to_layers(state), pipe.statistics(state), strict=True
    ):
        for kind, own in ((nnx.Param, params), (nnx.BatchStat, stats)):
            jax.tree.map(
                np.testing.assert_array_equal, own, nnx.to_pure_dict(nnx.state(block, kind))
            )


def test_the_sequential_program_starts_with_the_same_values() -> None:
    layers = [layer(block) for block in blocks(3)]
    params, stats = sequential.init(layers, X)
    pipe = build(layers, 2)
    state = pipe.init()
    jax.tree.map(np.testing.assert_array_equal, pipe.to_layers(state), params)
    jax.tree.map(np.testing.assert_array_equal, pipe.statistics(state), stats)


def test_layers_that_are_drawn_keep_their_values_beside_instances() -> None:
    described = layer(nnx.Linear, in_features=6, out_features=6)
    alone = build([described, described], 2)
    mixed = build([described, layer(nnx.Linear(6, 6, rngs=nnx.Rngs(5)))], 2)
    drawn, beside = (pipe.to_layers(pipe.init(seed=1))[0] for pipe in (alone, mixed))
    jax.tree.map(np.testing.assert_array_equal, drawn, beside)


def test_the_instance_stays_as_it_is() -> None:
    block = blocks(1)[0]
    before = nnx.to_flat_state(nnx.state(block))
    expected = block(jnp.asarray(X))
    block = blocks(1)[0]
    layer(block)
    assert [path for path, _ in nnx.to_flat_state(nnx.state(block))] == [path for path, _ in before]
    np.testing.assert_array_equal(block(jnp.asarray(X)), expected)
