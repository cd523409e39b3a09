"""Apply an `nnx.Module` as a layer: its parameters, statistics and constants come from outside."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx

from gpipe_jax.layers import batch_norm, constants
from gpipe_jax.layers.constants import Constants
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.sources.arguments import takes
from gpipe_jax.utils.trees import PyTree

# The variables of a module that are no constants.
KINDS = (nnx.Param, nnx.BatchStat, nnx.RngState)


class Template(NamedTuple):
    """Hold the static half of a module: its graph in both modes, and the shapes of its arrays."""

    params: PyTree  # as `jax.ShapeDtypeStruct`s
    stats: PyTree  # likewise
    train: nnx.GraphDef
    evaluate: nnx.GraphDef
    rng_state: tuple[tuple[tuple, type], ...]  # paths and types of its random streams
    norms: tuple[batch_norm.Norm, ...]
    constants: Constants


def template(module: nnx.Module, own: Constants, name: str) -> Template:
    """Split a module of shapes, from which the attributes with constants are taken."""
    norms = batch_norm.prepare(module, name)
    train, params, stats, rng_state, _ = nnx.split(module, *KINDS, ...)
    module.eval()
    evaluate = nnx.split(module, nnx.Param, ...)[0]
    flat = tuple((path, type(variable)) for path, variable in nnx.to_flat_state(rng_state))
    pure_params, pure_stats = (nnx.to_pure_dict(state) for state in (params, stats))
    return Template(pure_params, pure_stats, train, evaluate, flat, norms, own)


@dataclass(frozen=True)
class NnxLayer(Layer):
    """Describe a layer by an nnx module; subclasses say where the module comes from."""

    @property
    def template(self) -> Template:
        """Return the static half of the module."""
        raise NotImplementedError

    def init_statistics(self) -> PyTree:
        return batch_norm.fresh(self.template.stats)

    def init_constants(self) -> PyTree:
        return self.template.constants.arrays

    def shapes(self, x: PyTree, **extras: PyTree) -> tuple[PyTree, PyTree]:
        del x, extras  # nnx modules know the shape of their input
        return self.template.params, self.template.stats

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        template, key = self.template, context.key
        streams = [
            (path, _stream_value(kind, key, i)) for i, (path, kind) in enumerate(template.rng_state)
        ]
        graph = template.train if context.train else template.evaluate
        rng_state = nnx.to_pure_dict(nnx.from_flat_state(streams))
        arrays = self.init_constants() if context.constants is None else context.constants
        values = constants.fill(template.constants.places, arrays)
        module = nnx.merge(graph, params, stats, rng_state, constants.variables(values))
        values = constants.put(module, values)
        options = {"rngs": nnx.Rngs(key), "progress": context.progress}
        call: Any = type(module).__call__
        taken = {name: value for name, value in options.items() if takes(call, name)}
        y = module(x, **taken, **context.extras)
        constants.check_unchanged(module, values)
        if not (context.train and template.norms):
            return y, {}
        batch_stats = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        return y, batch_norm.moments(template.norms, stats, batch_stats)

    def commit(self, stats: PyTree, moments: PyTree) -> PyTree:
        return batch_norm.commit(self.template.norms, stats, moments)


def _stream_value(kind: type, key: jax.Array, i: int) -> nnx.Variable:
    value = jax.random.fold_in(key, i) if issubclass(kind, nnx.RngKey) else jax.numpy.uint32(0)
    return kind(value)
