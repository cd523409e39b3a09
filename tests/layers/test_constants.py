"""Keep arrays that modules hold as plain attributes: constants of a layer."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax.layers.layer import Context
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.layers.sources.describe import layer

X = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
KEY = jax.random.key(0)


class Part(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.scale = nnx.Param(jnp.ones(6))
        self.mask = np.arange(6) > 1

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.where(self.mask, x * self.scale[...], x)


class Tables(nnx.Module):
    """Hold constants of JAX and of numpy, of itself and of parts, in a list and in a tuple."""

    def __init__(self, start: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(6, 6, rngs=rngs)
        self.table = (jnp.arange(6.0) + start) / 10
        self.mean = np.linspace(0, 1, 6) * start
        self.parts = nnx.List([Part(rngs=rngs), Part(rngs=rngs)])
        self.pair = nnx.data((jnp.ones(6), 2))
        self.turns = nnx.List([jax.random.normal(jax.random.key(7), (6,))])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.linear(x - self.mean)) + self.table[jnp.arange(6)]
        for part in self.parts:
            x = part(x)
        return x * self.pair[0] * self.pair[1] + self.turns[0]


class Random(nnx.Module):
    """Draw features at random, and do not train them."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.features = jax.random.normal(rngs.params(), (6, 6))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.features


class Counting(nnx.Module):
    """Change an array in every call."""

    def __init__(self) -> None:
        self.calls = jnp.zeros(())

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls = self.calls + 1
        return x * self.calls


class Containers(nnx.Module):
    """Keep a module with a constant in a list of dicts."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.parts = nnx.data([{"tables": Tables(3, rngs=rngs)}])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.parts[0]["tables"](x)


class Keyed(nnx.Module):
    """Keep a random key."""

    def __init__(self) -> None:
        self.key = jax.random.key(3)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jax.random.normal(self.key, x.shape)


class Mixed(nnx.Module):
    """Keep an array in one container with a module."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.parts = nnx.data({"linear": nnx.Linear(6, 6, rngs=rngs), "mask": jnp.ones(6)})

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.parts["linear"](x) * self.parts["mask"]


def test_constants_are_those_of_the_module() -> None:
    one = layer(Tables, start=3)
    params = one.init(KEY, X)
    y, _ = one.apply(params, {}, jnp.asarray(X), Context(KEY, train=True))
    expected = Tables(3, rngs=nnx.Rngs(KEY))(jnp.asarray(X))
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    assert jax.tree.structure(params) == jax.tree.structure(one.shapes(X)[0])
    assert sorted(params) == ["linear", "parts"]


def test_modules_in_containers_keep_their_constants() -> None:
    one = layer(Containers)
    y, _ = one.apply(one.init(KEY, X), {}, jnp.asarray(X), Context(KEY, train=True))
    expected = Containers(rngs=nnx.Rngs(KEY))(jnp.asarray(X))
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_a_random_key_is_a_constant() -> None:
    y, _ = layer(Keyed).apply({}, {}, jnp.asarray(X), Context(KEY, train=True))
    np.testing.assert_allclose(y, Keyed()(jnp.asarray(X)), rtol=1e-6)


def test_arrays_beside_modules_in_an_attribute_are_refused() -> None:
    message = "layer 0, Mixed has arrays beside modules .* `parts`; give .* an attribute of their"
    with pytest.raises(ValueError, match=message):
        infer_shapes([layer(Mixed)], X)


def test_layers_with_other_constants_are_in_one_pipeline() -> None:
    layers = [layer(Tables, start=start) for start in (0, 1, 1)]
    batch = {"inputs": X, "labels": X}
    pipe = gpipe.Pipeline(
        layers,
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=2),
        micro_batches=2,
        example=batch,
    )
    state = pipe.init(seed=0)
    params = jax.tree.map(jnp.asarray, pipe.to_layers(state))

    def loss(params: list) -> jax.Array:
        x = jnp.asarray(X)
        for start, own in zip((0, 1, 1), params, strict=True):
            graph, trained, rest = nnx.split(Tables(start, rngs=nnx.Rngs(0)), nnx.Param, ...)
            nnx.replace_by_pure_dict(trained, own)
            x = nnx.merge(graph, trained, rest)(x)
        return jnp.square(x - X).mean()

    expected, gradients = jax.value_and_grad(loss)(params)
    (value, _), own, _ = pipe.value_and_grad(state, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(pipe.to_layers(own)), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max())


def test_constants_are_computed_while_a_program_around_is_traced() -> None:
    one = layer(Tables, start=5)
    y = jax.jit(lambda x: one.apply(one.init(KEY, x), {}, x, Context(KEY, train=False))[0])(X)
    np.testing.assert_allclose(y, Tables(5, rngs=nnx.Rngs(KEY))(jnp.asarray(X)), rtol=1e-5)


def test_constants_have_the_types_of_the_settings_now() -> None:
    one, types = layer(Tables, start=4), []
    for double in (True, False):
        with jax.enable_x64(double):
            x = jnp.zeros((2, 6))
            y, _ = one.apply(one.init(KEY, x), {}, x, Context(KEY, train=True))
            types.append(y.dtype)
    assert types == [jnp.float64, jnp.float32]


def test_a_constant_that_is_drawn_at_random_is_refused() -> None:
    message = (
        r"layer 1, Random\(\) draws its array `features` at random, .* only parameters; "
        r"make it an nnx.Param .* key of its own"
    )
    with pytest.raises(ValueError, match=message):
        infer_shapes([layer(Tables, start=0), layer(Random)], X)


def test_a_constant_that_a_call_changes_is_refused() -> None:
    message = "a call changes the array `calls` of Counting, .*leave the array as it is"
    with pytest.raises(ValueError, match=message):
        layer(Counting).apply({}, {}, jnp.asarray(X), Context(KEY, train=True))
    with pytest.raises(ValueError, match=re.escape("layer 0, Counting(), does not take")):
        infer_shapes([layer(Counting)], X)
