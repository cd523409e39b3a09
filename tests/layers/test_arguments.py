"""Check what `layer` and `Pipeline` say to what is no layer, and to wrong arguments."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.layer import Context
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.layers.sources.describe import layer

X = np.ones((4, 6), np.float32)
LINEAR = layer(nnx.Linear, in_features=6, out_features=6)


def init(key: jax.Array, x: jax.Array) -> dict:
    return {"w": jnp.ones((6, 6))}


def apply(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def pipeline(layers: Any) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        layers,
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=1),
        example={"inputs": X, "labels": X},
    )


def linen_batch_norm(frozen: bool) -> gpipe.Layer:
    module = nn.BatchNorm(use_running_average=frozen)
    return layer(module.init, module.apply)


def wrapped_batch_norm() -> gpipe.Layer:
    module = nn.BatchNorm(use_running_average=True)

    def start(key: jax.Array, x: jax.Array) -> Any:
        return module.init(key, x)

    return layer(start, module.apply)


# ---- layer --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nnx.Linear, 6, 4), r"Linear by name, got 2 .*layer\(Linear, in_features=6, out_features"),
        ((nnx.Linear, 6), r"by name, got 1 by position; write layer\(Linear, in_features=6\)"),
        ((5, apply), r"got 5 of type int and <function apply.*write layer\(Module"),
        ((init, 5), r"two functions \(init, apply\); got <function init.* and 5 of type int"),
        ((init, apply, 3), r"got <function init.* and 3 of type int"),
        ((init,), r"got <function init.*; if it returns a list of layers, call it"),
        ((nn.Dense,), r"got the class Dense; write layer\(Dense\(...\)\), with an instance"),
        ((nn.Dense(6), 3), r"Dense\(...\), a module instance and 3 .*without other arguments"),
        ((int,), r"got the class int; write layer\(Module"),
    ],
)
def test_what_describes_no_layer_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        layer(*arguments)


def test_an_instance_with_arguments_is_refused_in_one_line() -> None:
    message = r"got Linear\(...\), a module instance and width=; .*layer\(module\) for"
    with pytest.raises(TypeError, match=message) as refusal:
        layer(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), width=3)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"in_features": 6},
            "missing a required argument: 'out_features'; the arguments of Linear",
        ),
        (
            {"in_features": 6, "out_featurs": 6},
            "are: in_features, out_features, .*; it has no 'out_featurs'; did you mean 'out_feat",
        ),
        ({"in_features": 6, "out_features": 6, "rngs": 1}, "takes no `rngs`, got 1; leave it out"),
    ],
)
def test_arguments_that_the_constructor_does_not_take_are_refused(
    arguments: dict, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        layer(nnx.Linear, **arguments)


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (np.ones(2), r"must be hashable, .*'numpy.ndarray'; give numbers, texts, tuples and func"),
        ({"a": 1}, r"must be hashable, .*Wide\(width={'a': 1}\): unhashable type: 'dict'; give"),
    ],
)
def test_arguments_that_cannot_be_compared_are_refused(width: Any, message: str) -> None:
    class Wide(nnx.Module):
        def __init__(self, width: Any) -> None:
            self.width = width

    with pytest.raises(TypeError, match=message):
        layer(Wide, width=width)


def test_functions_that_cannot_be_compared_are_refused() -> None:
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, key: jax.Array, x: jax.Array) -> dict:
            return {}

    with pytest.raises(TypeError, match=r"must be hashable.*unhashable type"):
        layer(Unhashable(), apply)


def test_functions_without_a_signature_get_their_two_arguments() -> None:
    second = np.frompyfunc(lambda params, x: x, 2, 1)
    y, _ = layer(init, second).apply(1, {}, X, Context(jax.random.key(0), train=True))
    np.testing.assert_array_equal(np.float32(y), X)


def test_a_constructor_that_fails_is_named_and_not_the_layer_before() -> None:
    class Broken(nnx.Module):
        def __init__(self, width: int) -> None:
            raise RuntimeError(f"no width {width}")

    message = r"layer 1, Broken\(width=3\), cannot be built; .*of Broken \(RuntimeError: no width 3"
    with pytest.raises(ValueError, match=message):
        infer_shapes([LINEAR, layer(Broken, width=3)], X)


def test_parameters_that_are_no_arrays_are_refused() -> None:
    def start(key: jax.Array, x: jax.Array) -> dict:
        return {"w": jnp.ones((6, 6)), "activation": "tanh"}

    message = r"layer 1, apply: its `init` returns 'tanh' of type str at params\['activation'\]"
    with pytest.raises(ValueError, match=message):
        infer_shapes([LINEAR, layer(start, apply)], X)


# ---- lists of layers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (LINEAR, r"`layers` is one layer, Linear\(.*; put it into a list"),
        (nnx.Linear(6, 6, rngs=nnx.Rngs(0)), r"must be a list of layers, got Linear\(...\), a mod"),
        (nn.Dense(6), r"must be a list of layers, got Dense\(...\), .*by gpipe_jax.from_module"),
        ("mlp", "must be a list of layers, got 'mlp' of type str"),
        (None, "must be a list of layers, got None of type NoneType"),
        (
            [LINEAR, nnx.Linear(6, 6, rngs=nnx.Rngs(0))],
            r"`layers\[1\]` must .*layer\(Linear, ...\)",
        ),
        ([nn.Dense(6)], r"`layers\[0\]` must .*write layer\(Dense\(...\)\)"),
        ([nnx.Linear], r"`layers\[0\]` must be a layer, .*got the class Linear"),
        ([LINEAR, [LINEAR]], r"`layers\[1\]` must be a layer"),
    ],
)
def test_what_is_no_list_of_layers_is_refused(layers: Any, message: str) -> None:
    for use in (pipeline, lambda layers: gpipe.count_parameters(layers, X)):
        with pytest.raises(ArgumentError, match=message) as refusal:
            use(layers)
        assert refusal.value.argument == "layers"


# ---- what Linen keeps beside parameters ---------------------------------------------------------


@pytest.mark.parametrize(
    "one",
    [linen_batch_norm(False), linen_batch_norm(True), wrapped_batch_norm()],
    ids=["training", "frozen", "within a function"],
)
def test_statistics_of_linen_are_refused_and_not_trained(one: gpipe.Layer) -> None:
    message = r"layer 1, BatchNorm: its `init` returns 'batch_stats', .*use .*nnx.BatchNorm"
    with pytest.raises(ValueError, match=message):
        infer_shapes([LINEAR, one], X)


def test_any_collection_of_linen_but_parameters_is_refused() -> None:
    class Cached(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(6)(x) + self.variable("cache", "last", jnp.zeros, 6).value

    module = Cached()
    for init in (module.init, functools.partial(module.init)):
        with pytest.raises(ValueError, match="Cached: its `init` returns 'cache', but a pipeline"):
            infer_shapes([layer(init, functools.partial(module.apply))], X)


def test_dropout_of_linen_without_a_key_is_refused() -> None:
    module = nn.Dropout(0.5, deterministic=False)
    message = r"layer 1, Dropout draws random numbers, but its `apply` .*; write layer\(module\)"
    with pytest.raises(ValueError, match=message):
        infer_shapes([LINEAR, layer(module.init, module.apply)], X)


def test_constants_of_linen_are_kept_where_apply_gives_them() -> None:
    """Do what the message advises: a frozen batch norm keeps its statistics."""
    module = nn.BatchNorm(use_running_average=True)
    frozen = {"mean": jnp.full(6, 0.5), "var": jnp.full(6, 4.0)}

    def start(key: jax.Array, x: jax.Array) -> Any:
        return {"params": module.init(key, x)["params"]}

    def run(params: Any, x: jax.Array) -> Any:
        return module.apply({**params, "batch_stats": frozen}, x)

    pipe = pipeline([layer(start, run)])
    trainer = gpipe.Trainer(pipe, optax.sgd(0.1))
    state = trainer.init(seed=0)
    np.testing.assert_allclose(pipe.predict(state.state, X), 0.25, atol=1e-4)
    state, _ = trainer.step(state, {"inputs": X, "labels": X})
    assert list(pipe.to_layers(state.state)[0]["params"]) == ["bias", "scale"]
