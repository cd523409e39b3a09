"""Masks for the parameters of a user's own model: as plain optax on that model."""

from collections.abc import Callable
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
from gpipe_jax.training.grouping.transformation import GroupedState
from gpipe_jax.utils.trees import PyTree

WIDTH = 5
X = np.random.default_rng(0).normal(size=(8, WIDTH))
BATCH = {"inputs": X, "labels": X}


class Model(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List(
            [nnx.Linear(WIDTH, WIDTH, rngs=rngs, param_dtype=float) for _ in range(3)]
        )
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs, param_dtype=float)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Linen(nn.Module):
    def setup(self) -> None:
        self.blocks = [nn.Dense(WIDTH, param_dtype=float) for _ in range(3)]
        self.norm = nn.LayerNorm(param_dtype=float)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def build(model: Any, K: int = 2, **options: Any) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        gpipe.from_module(model, ["blocks", "norm"]),
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=K),
        example=BATCH,
        micro_batches=2,
        **options,
    )


def is_matrix(params: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a.ndim > 1, params)


def is_first(params: PyTree) -> PyTree:
    """Return a mask by the names that the model's own tree has."""
    return jax.tree.map_with_path(lambda path, _: path[:2] == FIRST, params)


FIRST = tuple(map(jax.tree_util.DictKey, ("blocks", 0)))


def make_tx(mask: Any) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(0.01, weight_decay=0.5, mask=mask)
    )


def plainly_trained(params: PyTree, apply: Callable, mask: Any) -> PyTree:
    """Train the model itself for two steps."""
    tx = make_tx(mask)
    state = tx.init(params)
    for _ in range(2):
        gradients = jax.grad(lambda p: jnp.square(apply(p) - X).mean())(params)
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def trained(pipe: gpipe.Pipeline, mask: Any) -> Any:
    trainer = gpipe.Trainer(pipe, make_tx(gpipe.optimizers.for_layers(pipe, mask)))
    current = trainer.init(seed=0)
    assert isinstance(current.opt_state, GroupedState)  # the mask is in use
    for _ in range(2):
        current, _ = trainer.step(current, BATCH)
    return pipe.to_module(current.state)


def assert_close(tree: PyTree, expected: PyTree) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), tree, expected
    )


@pytest.mark.parametrize("K", [2, *(pytest.param(K, marks=pytest.mark.slow) for K in (1, 4))])
@pytest.mark.parametrize("form", ["function", pytest.param("names", marks=pytest.mark.slow)])
def test_a_mask_of_an_nnx_model(K: int, form: str) -> None:
    with jax.enable_x64(True):
        model = Model(rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        mask = is_matrix if form == "function" else is_first(params)
        expected = plainly_trained(params, lambda p: nnx.merge(graph, p, rest)(X), mask)
        after = trained(build(model, K), mask)
        assert_close(nnx.state(after, nnx.Param), expected)


@pytest.mark.parametrize("K", [4, *(pytest.param(K, marks=pytest.mark.slow) for K in (1, 2))])
def test_a_mask_of_a_linen_model(K: int) -> None:
    with jax.enable_x64(True):
        model = Linen()
        bound = model.bind(model.init(jax.random.key(0), X))
        params: Any = bound.variables["params"]
        mask = {**is_matrix(params), "norm": True, "blocks_1": False}  # parts as a whole
        expected = plainly_trained(params, lambda p: model.apply({"params": p}, X), mask)
        assert_close(trained(build(bound, K), mask).variables["params"], expected)


def test_values_stand_in_the_places_of_the_layers() -> None:
    model = Model(rngs=nnx.Rngs(0))
    pipe = build(model, frozen=["1"])
    labels = {"blocks": {0: "a", 1: "b", 2: {"kernel": "c", "bias": "d"}}, "norm": "e"}
    assert gpipe.optimizers.for_layers(pipe, labels) == [
        {"kernel": "a", "bias": "a"},
        {"kernel": None, "bias": None},
        {"kernel": "c", "bias": "d"},
        {"scale": "e", "bias": "e"},
    ]
    whole = gpipe.optimizers.for_layers(pipe, is_first(nnx.state(model, nnx.Param)))
    assert whole[0]["kernel"] and not whole[2]["kernel"]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"blocks": True}, r"`mask` has no value for the parameter 'norm.bias' of the model; make"),
        ({"blocks": True, "norm": True, "nrm": True}, r"has a value for 'nrm', but the model has"),
    ],
)
def test_a_mask_of_another_model(mask: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        gpipe.optimizers.for_layers(build(Model(rngs=nnx.Rngs(0))), mask)


def test_without_a_model() -> None:
    pipe = gpipe.Pipeline(
        [gpipe.layer(nnx.Linear, in_features=WIDTH, out_features=WIDTH)],
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=1),
        example=jax.tree.map(np.float32, BATCH),
    )
    with pytest.raises(ArgumentError, match=r"layer 0, .* write the mask for the list of trees"):
        gpipe.optimizers.for_layers(pipe, is_matrix)


def test_a_mask_as_it_is_names_the_remedy() -> None:
    model = Model(rngs=nnx.Rngs(0))
    tx = make_tx(is_matrix(nnx.state(model, nnx.Param)))
    with pytest.raises(ArgumentError, match=r"optimizers.for_layers\(pipe, mask\)"):
        gpipe.Trainer(build(model), tx)
