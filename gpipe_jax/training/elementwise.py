"""Check that an optimizer acts on each element alone, so that packing parameters is harmless.

The check runs two updates twice: on arrays of several shapes, and on the same numbers packed into
one vector. It also looks at the optimizer's state, which `checkpoint` cuts by layers.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpipe_jax.utils.trees import PyTree


class _Probe(NamedTuple):
    """Describe an array of the trial."""

    shape: tuple[int, ...]
    scale: float  # standard deviation of its numbers


# Each array is there for optimizers that treat it differently from a vector of the same numbers.
_LARGE, _SMALL = 30.0, 1.0
_PROBES = {
    # LAMB and LARS scale an update by the norms of its own array. So the arrays differ in scale.
    "scalar": _Probe((), _LARGE),
    "vector": _Probe((5,), _LARGE),  # a mask by rank leaves out norms and biases
    # Adafactor factors the second moments of a matrix if both sides have at least 128 elements.
    "factored_matrix": _Probe((128, 129), _SMALL),
    # Transformations that see a kernel's rank: centralized gradients, Muon, Shampoo.
    "rank_3": _Probe((2, 3, 4), _LARGE),
    "convolution": _Probe((2, 3, 1, 4), _LARGE),
    "rank_5": _Probe((2, 1, 3, 2, 2), _LARGE),
}
_TOLERANCE = 1e-4  # of the largest update: float32 and another order of sums give less

_REFUSED = (
    "this optax transformation depends on how parameters are grouped into arrays (as Adafactor, "
    "LAMB or a mask do), so its result would depend on the number of stages; use elementwise "
    "transformations and global norms (SGD, Adam, RMSProp, clip_by_global_norm)"
)


@functools.lru_cache(maxsize=16)
def check_elementwise(tx: optax.GradientTransformation) -> None:
    """Check that an optimizer gives the same result on packed parameters as on the layers' own.

    Args:
        tx: An optax transformation.

    Raises:
        ValueError: It does not, or its state has arrays that are not in the form of the parameters.
    """
    rng = np.random.default_rng(0)
    params, *gradients = (_draw(rng) for _ in range(3))
    try:
        accepted = _state_is_like_params(tx, params) and _packing_is_harmless(tx, params, gradients)
    except Exception as error:  # optax raises anything for arrays that it cannot take
        raise ValueError(f"{_REFUSED} ({type(error).__name__}: {error})") from error
    if not accepted:
        raise ValueError(_REFUSED)


def _draw(rng: np.random.Generator) -> PyTree:
    return {
        name: np.float32(probe.scale * rng.normal(size=probe.shape))
        for name, probe in _PROBES.items()
    }


def _state_is_like_params(tx: optax.GradientTransformation, params: PyTree) -> bool:
    """Return whether the state holds only scalars, and trees in the form of the parameters.

    Such trees can be cut by layers. A `MaskedState` cannot: it leaves out some of the parameters.
    """

    def form(tree: PyTree) -> tuple[Any, list[tuple[int, ...]]]:
        return jax.tree.structure(tree), [np.shape(a) for a in jax.tree.leaves(tree)]

    def is_like_params(node: PyTree) -> bool:
        return form(node) == form(params)

    def is_masked(node: PyTree) -> bool:
        return isinstance(node, optax.MaskedState)

    state = jax.eval_shape(tx.init, params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: is_like_params(node) or is_masked(node))
    return all(is_like_params(node) or (not is_masked(node) and node.shape == ()) for node in nodes)


def _packing_is_harmless(
    tx: optax.GradientTransformation, params: PyTree, gradients: Sequence[PyTree]
) -> bool:
    """Return whether the updates of the arrays are those of one vector of the same numbers."""
    trees = (params, *gradients)
    packed = tuple({"packed": _flatten(tree)} for tree in trees)

    @jax.jit
    def both(packed: Any, trees: Any) -> tuple[PyTree, PyTree]:
        return _sum_of_updates(tx, *packed), _sum_of_updates(tx, *trees)

    of_packed, of_trees = map(_flatten, both(packed, trees))
    largest = np.abs(of_trees).max()
    return bool(np.abs(of_packed - of_trees).max() <= _TOLERANCE * largest)


def _sum_of_updates(tx: Any, params: PyTree, *gradients: PyTree) -> PyTree:
    """Return the sum of one update per gradient.

    The parameters themselves would hide the small updates of a long warm-up.
    """
    tx = optax.with_extra_args_support(tx)
    state = tx.init(params)
    total = jax.tree.map(jnp.zeros_like, params)
    decaying = jax.tree.map(jnp.ones_like, params)
    for grads in gradients:
        updates, state = tx.update(grads, state, params, decaying=decaying)
        params = optax.apply_updates(params, updates)
        total = jax.tree.map(jnp.add, total, updates)
    return total


def _flatten(tree: PyTree) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])
