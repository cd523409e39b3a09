"""Build small networks that are hard to divide into stages, and compare trees leaf by leaf."""

import dataclasses
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax import sequential
from gpipe_jax.layers import random_keys
from gpipe_jax.utils.trees import PyTree


class Join(nnx.Module):
    """Map {"x", "skip", "ids"} to the same with other widths: a boundary of several tensors."""

    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, out, rngs=rngs)
        self.table = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (5, out)))

    def __call__(self, tree: dict) -> dict:
        y = jnp.tanh(self.linear(tree["x"]) + self.table[...][tree["ids"]])
        return {
            "x": y,
            "skip": tree["x"] - 0.5 * tree["skip"].mean(-1, keepdims=True),
            "ids": tree["ids"],
        }


class Split(nnx.Module):
    """Map an array to the first boundary; its integer leaf crosses all stages."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict:
        ids = (jnp.abs(x[:, 0]) * 7).astype(jnp.int32) % 5
        return {"x": self.linear(x), "skip": x[:, :2], "ids": ids}


def scores_init(key: jax.Array, tree: dict) -> dict:
    return {"w": jax.random.normal(key, (tree["x"].shape[-1], 4), tree["x"].dtype)}


def scores_apply(params: dict, tree: dict) -> jax.Array:
    return tree["x"] @ params["w"] + tree["skip"].mean(-1, keepdims=True)


def pytree_mlp() -> list[gpipe.Layer]:
    widths = (6, 5, 5, 5, 5, 9, 4, 7)
    joins = [gpipe.layer(Join, width=a, out=b) for a, b in pairwise(widths)]
    return [gpipe.layer(Split, width=6), *joins, gpipe.layer(scores_init, scores_apply)]


def transformer(dropout: float = 0.0) -> list[gpipe.Layer]:
    return gpipe.zoo.transformer_lm(
        vocabulary=11,
        length=5,
        width=8,
        heads=2,
        feed_forward=12,
        layers=7,
        dropout=dropout,
        dtype=str(jnp.zeros(()).dtype),
    )


def convnet() -> list[gpipe.Layer]:
    return gpipe.zoo.convnet((4, 8, 12), (2, 2, 2))


@dataclasses.dataclass(frozen=True)
class InDefaultFloat(gpipe.Layer):
    """Hold the parameters of a layer in float64 under x64; nnx alone makes float32 ones."""

    layer: gpipe.Layer

    def init(self, key: jax.Array, x: PyTree, **extras: PyTree) -> PyTree:
        return in_default_float(self.layer.init(key, x, **extras))

    def init_statistics(self) -> PyTree:
        return in_default_float(self.layer.init_statistics())

    def apply(self, params: PyTree, stats: PyTree, x: PyTree, context: Any) -> tuple:
        return self.layer.apply(params, stats, x, context)

    def commit(self, stats: PyTree, moments: PyTree) -> PyTree:
        return self.layer.commit(stats, moments)


def in_default_float(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: a.astype(jnp.zeros(()).dtype), tree)


def widened(layers: list[gpipe.Layer]) -> list[gpipe.Layer]:
    """Return the layers in float64 under `jax.enable_x64`."""
    if not jax.config.jax_enable_x64:
        return layers
    return [
        InDefaultFloat(a, stashes=a.stashes, pops=a.pops, ties=a.ties, reads=a.reads)
        for a in layers
    ]


def network(name: str, **kwargs: Any) -> list[gpipe.Layer]:
    """Return the layers of that name, in float64 under `jax.enable_x64`."""
    return widened(NETWORKS[name](**kwargs))


def unusual() -> list[gpipe.Layer]:
    """Return layers with loops from a constant, branches, constant leaves, no parameters, flags.

    The boundaries have leaves of three types, one of them without elements.
    """

    def start(params: dict, x: jax.Array) -> dict:
        return {"x": x @ params["w"], "aux": jnp.zeros(x.shape[0]), "flag": x[:, 0] > 0}

    def recurrent(params: dict, tree: dict) -> dict:
        def step(i: int, h: jax.Array) -> jax.Array:
            return jnp.tanh(tree["x"] + h * params["scale"])

        h = jax.lax.fori_loop(0, 3, step, jnp.zeros_like(tree["x"]))
        return {**tree, "x": h, "empty": jnp.zeros((0,))}

    def branch(params: dict, tree: dict) -> dict:
        total = tree["x"].sum() + 1e9
        y = jax.lax.cond(total > 0, lambda x: x * params["w"].sum(), jnp.zeros_like, tree["x"])
        return {**tree, "x": y, "aux": tree["aux"] + (y**2).mean(-1)}

    def plain(params: dict, tree: dict) -> dict:
        return {**tree, "x": jnp.where(tree["flag"][:, None], tree["x"], -tree["x"])}

    def end(params: dict, tree: dict) -> jax.Array:
        return tree["x"] @ params["w"] + tree["aux"][:, None]

    def weights(*shape: int) -> Any:
        return lambda key, x: {"w": jax.random.normal(key, shape)}

    return [
        gpipe.layer(weights(3, 6), start),
        gpipe.layer(lambda key, x: {"scale": jnp.asarray(0.5)}, recurrent),
        gpipe.layer(weights(4), branch),
        gpipe.layer(lambda key, x: {}, plain),
        gpipe.layer(weights(6, 4), end),
    ]


NETWORKS = {"transformer": transformer, "convnet": convnet, "pytree_mlp": pytree_mlp}


def make_batch(name: str, examples: int, seed: int = 0) -> dict:
    """Return a batch with unequal weights for the network of that name."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 2.0, examples)
    if name == "transformer":
        tokens = rng.integers(0, 11, (examples, 6))
        return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights}
    shape, classes = ((8, 8, 1), 10) if name == "convnet" else ((3,), 4)
    inputs = rng.normal(size=(examples, *shape))
    return {"inputs": inputs, "labels": rng.integers(0, classes, examples), "weights": weights}


def reference(layers: list[gpipe.Layer], batch: dict, micro_batches: int = 1) -> tuple:
    """Return (params, loss, metrics, grads) of the plain sequential program, in its own dtype."""
    batch = jax.tree.map(jnp.asarray, batch)
    params, stats = sequential.init(layers, jax.tree.map(lambda a: a[:1], batch["inputs"]), seed=1)
    step = jax.jit(
        sequential.value_and_grad(layers, gpipe.losses.softmax_cross_entropy, micro_batches)
    )
    (loss, metrics), grads, _ = step(params, stats, batch, random_keys.step_key(1, 0))
    return jax.tree.map(np.asarray, (params, loss, metrics, grads))


def assert_trees_close(actual: PyTree, expected: PyTree, tolerance: float) -> None:
    """Check that leaves are finite, and within `tolerance` of the largest expected element."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        name, a, b = jax.tree_util.keystr(path), np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, name
        assert np.isfinite(a).all(), f"{name} is not finite"
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"
