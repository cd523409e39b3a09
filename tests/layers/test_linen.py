"""Take Linen modules as layers, and refuse what a pipeline cannot carry."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpipe_jax as gpipe
from gpipe_jax.layers.layer import Context
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.layers.sources.describe import layer

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
KEY = jax.random.key(0)


class Block(nn.Module):
    """Add a dense layer, with dropout in training."""

    width: int
    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        y = nn.tanh(nn.Dense(self.width)(nn.LayerNorm()(x)))
        return x + nn.Dropout(self.rate)(y, deterministic=not train)


@pytest.mark.parametrize(
    ("stages", "replicas"), [(2, 2), pytest.param(1, 1, marks=pytest.mark.slow)]
)
def test_a_linen_network_has_the_loss_and_gradients_of_flax(stages: int, replicas: int) -> None:
    modules = [nn.Dense(6), Block(6), Block(6), nn.Dense(4)]
    batch = {"inputs": X, "labels": np.ones((8, 4), np.float32)}
    pipe = gpipe.Pipeline(
        [layer(module) for module in modules],
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=stages, data=replicas),
        example=batch,
        micro_batches=2,
    )
    assert pipe.layers[1] == pipe.layers[2]
    state = pipe.init(seed=0)

    def loss(params: list) -> jax.Array:
        x: Any = jnp.asarray(X)
        for module, own in zip(modules, params, strict=True):
            options: Any = {"train": True} if isinstance(module, Block) else {}
            x = module.apply({"params": own}, x, **options)
        return jnp.square(x - 1).mean()

    expected, gradients = jax.value_and_grad(loss)(pipe.to_layers(state))
    (value, _), own, _ = pipe.value_and_grad(state, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jax.tree.structure(pipe.to_layers(own)) == jax.tree.structure(gradients)
    for a, b in zip(jax.tree.leaves(pipe.to_layers(own)), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, np.abs(b).max()))


def test_dropout_follows_the_key_in_training_only() -> None:
    one = layer(Block(6, rate=0.5))
    params = one.init(KEY, X)

    def run(key: jax.Array, *, train: bool) -> jax.Array:
        return one.apply(params, {}, jnp.asarray(X), Context(key, train))[0]

    np.testing.assert_array_equal(run(KEY, train=True), run(KEY, train=True))
    assert not np.array_equal(run(KEY, train=True), run(jax.random.key(1), train=True))
    np.testing.assert_array_equal(run(KEY, train=False), run(jax.random.key(1), train=False))


def test_an_attribute_of_the_module_stays() -> None:
    y, _ = layer(nn.Dropout(0.5, deterministic=True)).apply({}, {}, X, Context(KEY, train=True))
    np.testing.assert_array_equal(y, X)


class Widths(nn.Module):
    """Apply dense layers; the widths are a list, which cannot be hashed."""

    widths: list[int]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.Dense(width)(x)
        return x


@pytest.mark.parametrize(
    "module", [Widths([3, 4]), nn.Sequential([nn.Dense(3), nn.tanh, Widths([4])])]
)
def test_lists_in_attributes_become_tuples(module: nn.Module) -> None:
    one = layer(module)
    assert one == layer(module)
    params = one.init(KEY, X)
    y, _ = one.apply(params, {}, jnp.asarray(X), Context(KEY, train=True))
    np.testing.assert_allclose(y, module.apply({"params": params}, X), rtol=1e-6)


def test_statistics_are_refused() -> None:
    message = (
        r"layer 1, BatchNorm\(...\) has variables 'batch_stats' beside 'params'.*nnx.BatchNorm"
    )
    with pytest.raises(ValueError, match=message):
        infer_shapes([layer(nn.Dense(6)), layer(nn.BatchNorm(use_running_average=True))], X)
