"""Running statistics of batch norm, committed once a step (GPipe, section 2.2).

In training a batch norm normalises with the statistics of its micro-batch. What it sees there is
returned as moments about the running mean r:

    E[x - r]   and   E[(x - r)^2] = var + (mean - r)^2

Their averages over the micro-batches of a step, which are equally large, are the moments of the
whole mini-batch, and give its mean and variance. About r rather than zero, because the difference
of large numbers would lose what matters when the mean is far from zero.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpipe_jax.utils.trees import PyTree


class Norm(NamedTuple):
    """One `nnx.BatchNorm` of a module: its path there, and the decay of its running statistics."""

    path: tuple
    momentum: float


class WholeStatistic(nnx.BatchStat):
    """Hold a statistic that is always set as a whole (see `utils.xla_workarounds`).

    `nnx.Variable` first compares the shardings of the old and the new value. Traced arrays have
    none, and JAX searches the whole program to say so: 97 % of the time to trace an AmoebaNet.
    """

    def __setitem__(self, key: Any, value: jax.Array) -> None:
        del key  # all of it
        self.set_value(value)


def _whole(statistic: nnx.Variable) -> WholeStatistic:
    return WholeStatistic(statistic.get_value())


def prepare(module: nnx.Module, name: str) -> tuple[Norm, ...]:
    """The batch norms of a module, which from now on keep what they see as it is.

    With momentum 0 the values after a call are the statistics of that call's input.
    """
    norms, known = [], set()
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.BatchNorm):
            known |= {(*path, "mean"), (*path, "var")}
            if not part.use_running_average:  # else it is frozen
                norms.append(Norm(tuple(path), part.momentum))
                part.momentum = 0.0
                part.mean, part.var = map(_whole, (part.mean, part.var))
    stats = nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
    other = [".".join(map(str, path)) for path, _ in stats if path not in known]
    if other:
        raise ValueError(
            f"layer {name} has statistics that are not of an nnx.BatchNorm: {', '.join(other)}; "
            f"a pipeline knows how to add up those of nnx.BatchNorm only"
        )
    return tuple(norms)


def fresh(shapes: PyTree) -> PyTree:
    """Running statistics as `nnx.BatchNorm` starts them: mean 0, variance 1."""

    def one(path: tuple, a: Any) -> jax.Array:
        return jnp.full(a.shape, float(path[-1].key == "var"), a.dtype)

    return jax.tree.map_with_path(one, shapes)


def moments(norms: tuple[Norm, ...], stats: PyTree, seen: PyTree) -> PyTree:
    """The moments about the running means, from the `seen` means and variances."""
    for norm in norms:
        running, here = _at(stats, norm.path), _at(seen, norm.path)
        shift = here["mean"] - running["mean"]
        here["mean"], here["var"] = shift, here["var"] + shift**2
    return seen


def commit(norms: tuple[Norm, ...], stats: PyTree, moments: PyTree) -> PyTree:
    """Running statistics moved towards the mean and variance that these moments stand for."""
    result = jax.tree.map(lambda a: a, stats)
    for norm in norms:
        running, new, seen = (_at(tree, norm.path) for tree in (stats, result, moments))
        keep, shift = norm.momentum, seen["mean"]
        variance = jnp.maximum(seen["var"] - shift**2, 0)
        new["mean"] = running["mean"] + (1 - keep) * shift
        new["var"] = keep * running["var"] + (1 - keep) * variance
    return result


def _at(tree: PyTree, path: tuple) -> dict:
    for key in path:
        tree = tree[key]
    return tree
