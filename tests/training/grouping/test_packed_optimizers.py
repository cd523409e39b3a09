"""Check optimizers with masks and groups on pipelines: as plain optax on the layers' own trees."""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpipe_jax as gpipe
from gpipe_jax.errors import ArgumentError
from gpipe_jax.training.grouping.transformation import GroupedState
from gpipe_jax.utils.trees import path_name

STEPS = 4


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


# --- networks -------------------------------------------------------------------------------------


def dense_init(width: int, key: jax.Array, x: jax.Array) -> dict:
    return {
        "kernel": jax.random.normal(key, (x.shape[-1], width)) / x.shape[-1] ** 0.5,
        "bias": jax.random.normal(key, (width,)) / 10,
        "gain": jnp.ones(()),
    }


def dense_apply(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["kernel"] + params["bias"]) * params["gain"]


def unequal_layers() -> list[gpipe.Layer]:
    """Return layers of many widths, which are packed."""
    widths = (6, 6, 6, 6, 9, 9, 4, 5)
    inits = {width: functools.partial(dense_init, width) for width in widths}
    return [gpipe.layer(inits[width], dense_apply) for width in widths]


def equal_layers() -> list[gpipe.Layer]:
    """Return equal layers, which are slots, in runs of two and more."""
    return [gpipe.layer(functools.partial(dense_init, 5), dense_apply)] * 8


def squared_error(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.sum((outputs - labels) ** 2, axis=-1)


def make_batches() -> Iterator[dict]:
    for step in itertools.count():
        rng = np.random.default_rng(step)
        yield {"inputs": rng.normal(size=(8, 5)), "labels": rng.normal(size=(8, 5))}


def make_trainer(layers: list, tx: Any, K: int, D: int = 1, **options: Any) -> gpipe.Trainer:
    pipe = gpipe.Pipeline(
        layers,
        loss=squared_error,
        mesh=gpipe.make_mesh(stages=K, data=D),
        example=next(make_batches()),
        micro_batches=2,
        **options,
    )
    return gpipe.Trainer(pipe, tx)


# --- optimizers -----------------------------------------------------------------------------------


def is_matrix(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.ndim(a) > 1, tree)


def by_path(function: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda tree: jax.tree.map_with_path(lambda path, _: function(path_name(path)), tree)


def is_late(name: str) -> bool:
    """Tell the layers of one run apart."""
    return int(name.split(".")[0]) in (1, 4, 5, 7)


def kind(name: str) -> str:
    return name.split(".")[1]


def as_tree(function: Callable[[str], Any]) -> Any:
    """Return a mask that was computed before."""
    names = ("kernel", "bias", "gain")
    return [{name: function(f"{i}.{name}") for name in names} for i in range(8)]


OPTIMIZERS = {
    "adamw by rank": lambda: optax.adamw(0.01, weight_decay=0.1, mask=is_matrix),
    "sgd by path": lambda: optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), by_path(is_late)),
        optax.sgd(0.05, momentum=0.9),
    ),
    "a tree": lambda: optax.adamw(0.01, weight_decay=0.1, mask=as_tree(is_late)),
    "labels": lambda: optax.multi_transform(
        {"kernel": optax.adamw(0.01), "bias": optax.sgd(0.1, 0.9), "gain": optax.rmsprop(0.01)},
        by_path(kind),
    ),
    "partition by key": lambda: optax.transforms.partition(
        {"bias": optax.sgd(0.1, 0.9), "rest": optax.adam(0.01)},
        lambda tree: jax.tree.map_with_path(
            lambda path, _: "bias" if "bias" in jax.tree_util.keystr(path) else "rest", tree
        ),
    ),
    "selective": lambda: optax.transforms.selective_transform(
        optax.adam(0.01), freeze_mask=as_tree(is_late)
    ),
    "frozen": lambda: optax.multi_transform(
        {True: optax.adam(0.01), False: optax.set_to_zero()}, by_path(is_late)
    ),
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(0.01, weight_decay=0.1, mask=is_matrix)
    ),
    "clipped by group": lambda: optax.multi_transform(
        {
            True: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9)),
            False: optax.chain(optax.adam(0.01), optax.clip_by_global_norm(0.01)),
        },
        is_matrix,
    ),
    "accumulated": lambda: optax.MultiSteps(
        optax.adamw(0.01, weight_decay=0.1, mask=is_matrix), 2
    ).gradient_transformation(),
}


@functools.cache
def plain(name: str, layers_of: Callable) -> list:
    """Train the sequential program with plain optax on the layers' trees."""
    layers, tx = layers_of(), OPTIMIZERS[name]()
    params: Any = initial(layers_of)
    state = tx.init(params)
    loss = jax.jit(jax.grad(lambda p, b: plain_loss(layers, p, b)))
    for _, batch in zip(range(STEPS), make_batches(), strict=False):
        updates, state = tx.update(loss(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    return params


def plain_loss(layers: list, params: list, batch: dict) -> jax.Array:
    x = batch["inputs"]
    for p in params:
        x = dense_apply(p, x)
    return squared_error(x, batch["labels"]).mean()


@functools.cache
def initial(layers_of: Callable) -> list:
    pipe = make_trainer(layers_of(), optax.sgd(0.1), 1).pipe
    return jax.tree.map(jnp.asarray, pipe.to_layers(pipe.init(seed=0)))


def trained(trainer: gpipe.Trainer) -> tuple[list, Any]:
    current = trainer.init(seed=0)
    current = trainer.fit(current, make_batches(), STEPS, record=lambda record: None)
    return trainer.pipe.to_layers(current.state), current


def assert_close(trees: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), trees, expected
    )


FEW = [("clipped", 2, unequal_layers), ("a tree", 2, equal_layers)]


@pytest.mark.parametrize(
    ("name", "K", "layers_of"),
    [
        pytest.param(*case, marks=() if case in FEW else pytest.mark.slow)
        for case in itertools.product(OPTIMIZERS, (1, 2, 4), (unequal_layers, equal_layers))
    ],
)
def test_as_plain_optax(name, K, layers_of):
    trainer = make_trainer(layers_of(), OPTIMIZERS[name](), K)
    params, current = trained(trainer)
    assert isinstance(current.opt_state, GroupedState)
    assert_close(params, plain(name, layers_of))


@pytest.mark.parametrize("make", [lambda: optax.adam(0.01), lambda: optax.sgd(0.1, 0.9)])
def test_elementwise_optimizers_stay_as_they_are(make):
    trainer = make_trainer(equal_layers(), make(), 2)
    assert not isinstance(trainer.train_step.local_shapes.opt_state, GroupedState)


def test_what_mixes_elements_names_its_substitute():
    with pytest.raises(ValueError, match=r"depends on how parameters are grouped.*optax\.adamw"):
        make_trainer(unequal_layers(), optax.adafactor(0.01), 2)


def test_a_mask_of_another_tree():
    tx = optax.adamw(0.01, mask={"kernel": True, "bias": False})
    match = r"list of 8 trees that `pipe.to_layers\(state\)` returns, .*optimizers\.grouped"
    with pytest.raises(ArgumentError, match=match):
        make_trainer(unequal_layers(), tx, 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            optax.contrib.reduce_on_plateau,
            r"needs more than .* a schedule .*Stopping.*'value'",
        ),
        (optax.polyak_sgd, r"needs more than gradients, .*'value'"),
        (lambda: optax.lookahead(optax.sgd(0.1), 5, 0.5), r"keeps two sets .*Trainer\(ema=0\.99\)"),
        (
            lambda: optax.multi_transform({"kernel": optax.sgd(0.1)}, by_path(kind)),
            r"no transformation for some of the labels; give one .*keys: \['kernel'\]",
        ),
    ],
)
def test_what_optax_refuses_has_its_cause(make, match):
    with pytest.raises(ArgumentError, match=match):
        make_trainer(unequal_layers(), make(), 2)


def test_a_state_moves_to_another_number_of_stages():
    tx = OPTIMIZERS["labels"]()
    one, other = (make_trainer(unequal_layers(), tx, K) for K in (2, 4))
    batches = make_batches()
    current = one.fit(one.init(seed=0), batches, 2, record=lambda record: None)
    moved = other.from_layers(one.to_layers(current), 2)
    end = other.fit(moved, batches, STEPS, record=lambda record: None)
    assert_close(other.pipe.to_layers(end.state), plain("labels", unequal_layers))
