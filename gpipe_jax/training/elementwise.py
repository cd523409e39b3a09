"""Check that an optimizer acts on each element alone, so that packing parameters changes no result."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpipe_jax.training.optimizers import PyTree


@functools.lru_cache(maxsize=16)
def check_elementwise(tx: optax.GradientTransformation) -> None:
    """Raise ValueError if `tx` would act on packed parameters otherwise than on the layers' own.

    Tries two steps on arrays of rank 0 to 5, and on the same numbers packed into one array. The
    matrix is of a size that Adafactor factors, and the others' numbers are much larger. What it
    keeps for each parameter must be of the parameter's shape, and masked it may not be at all.
    """
    rng = np.random.default_rng(0)
    scales = {(): 30, (5,): 30, (128, 129): 1, (2, 3, 4): 30, (2, 3, 1, 4): 30, (2, 1, 3, 2, 2): 30}
    draw = lambda: {len(s): c * rng.normal(size=s) for s, c in scales.items()}  # noqa: E731
    trees = [jax.tree.map(np.float32, draw()) for _ in range(3)]
    try:
        alike = _keeps_their_shapes(tx, trees[0]) and _acts_alike(tx, trees)
    except Exception as error:
        raise ValueError(f"{_REFUSED} ({type(error).__name__}: {error})") from error
    if not alike:
        raise ValueError(_REFUSED)


_REFUSED = (
    "this optax transformation depends on how parameters are grouped into arrays (as Adafactor, "
    "LAMB or a mask do), so its result would depend on the number of stages; use elementwise "
    "transformations and global norms (SGD, Adam, RMSProp, clip_by_global_norm)"
)


def _keeps_their_shapes(tx: optax.GradientTransformation, params: PyTree) -> bool:
    """Whether its state holds numbers and arrays in the parameters' form only."""
    shapes = lambda tree: (jax.tree.structure(tree), [np.shape(a) for a in jax.tree.leaves(tree)])  # noqa: E731
    alike = lambda node: shapes(node) == shapes(params)  # noqa: E731
    stop = lambda node: alike(node) or isinstance(node, optax.MaskedState)  # noqa: E731
    parts = jax.tree.leaves(jax.eval_shape(tx.init, params), is_leaf=stop)
    return all(alike(p) or (not isinstance(p, optax.MaskedState) and not p.shape) for p in parts)


def _acts_alike(tx: optax.GradientTransformation, trees: Sequence[PyTree]) -> bool:
    packed = [{"packed": _flat(tree)} for tree in trees]
    both = jax.jit(lambda one, other: (_two_updates(tx, *one), _two_updates(tx, *other)))
    have, want = map(_flat, both(packed, trees))
    return bool(np.abs(have - want).max() <= 1e-4 * np.abs(want).max())


def _two_updates(tx: Any, params: PyTree, *gradients: PyTree) -> PyTree:
    """Their sum: the parameters themselves would hide the small updates of a long warm-up."""
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    total = jax.tree.map(jnp.zeros_like, params)
    decaying = jax.tree.map(jnp.ones_like, params)
    for grads in gradients:
        updates, state = tx.update(grads, state, params, decaying=decaying)
        params = optax.apply_updates(params, updates)
        total = jax.tree.map(jnp.add, total, updates)
    return total


def _flat(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])
