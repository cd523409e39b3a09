"""Update the running statistics of batch norm once a step (GPipe, section 2.2).

In training a batch norm normalises with the statistics of its micro-batch. It returns them as
moments about the running mean r:

    E[x - r]   and   E[(x - r)^2] = var + (mean - r)^2

The micro-batches of a step are equally large. So the averages of their moments are the moments of
the whole batch, and give its mean and variance. Moments about zero would be inaccurate for a mean
far from zero: the variance would be a small difference of large numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gpipe_jax.layers.constants import UnfitModuleError
from gpipe_jax.utils.trees import PyTree


class Norm(NamedTuple):
    """Describe one `nnx.BatchNorm` of a module."""

    path: tuple  # in the module
    momentum: float  # decay of its running statistics in a step


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
    """Return the batch norms of a module, and make them store the statistics of each call.

    With momentum 0 the values after a call are the statistics of that call's input.
    """
    norms, known = [], set()
    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.BatchNorm):
            known |= {(*path, "mean"), (*path, "var")}
            if not part.use_running_average:  # which freezes it
                norms.append(Norm(tuple(path), part.momentum))
                part.momentum = 0.0
                part.mean, part.var = map(_whole, (part.mean, part.var))
    stats = nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
    other = [".".join(map(str, path)) for path, _ in stats if path not in known]
    if other:
        raise UnfitModuleError(
            f"{name} has statistics that are not of an nnx.BatchNorm: {', '.join(other)}; "
            f"a pipeline can only combine those of nnx.BatchNorm"
        )
    return tuple(norms)


def fresh(shapes: PyTree) -> PyTree:
    """Return running statistics as `nnx.BatchNorm` starts them: mean 0, variance 1."""

    def fill(path: tuple, a: Any) -> jax.Array:
        return jnp.full(a.shape, 1.0 if path[-1].key == "var" else 0.0, a.dtype)

    return jax.tree.map_with_path(fill, shapes)


def moments(norms: tuple[Norm, ...], stats: PyTree, batch_stats: PyTree) -> PyTree:
    """Turn the means and variances of a micro-batch, in place, into moments about running means."""
    for norm in norms:
        running, batch = _at(stats, norm.path), _at(batch_stats, norm.path)
        shift = batch["mean"] - running["mean"]
        batch["mean"], batch["var"] = shift, batch["var"] + shift**2
    return batch_stats


def commit(norms: tuple[Norm, ...], stats: PyTree, moments: PyTree) -> PyTree:
    """Return the running statistics moved towards the mean and variance of these moments."""
    result = jax.tree.map(lambda a: a, stats)
    for norm in norms:
        running, new, moment = (_at(tree, norm.path) for tree in (stats, result, moments))
        keep, shift = norm.momentum, moment["mean"]
        variance = jnp.maximum(moment["var"] - shift**2, 0)
        new["mean"] = running["mean"] + (1 - keep) * shift
        new["var"] = keep * running["var"] + (1 - keep) * variance
    return result


def _at(tree: PyTree, path: tuple) -> dict:
    for key in path:
        tree = tree[key]
    return tree
