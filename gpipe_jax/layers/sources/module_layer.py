"""Describe a layer by an `nnx.Module`, which is built under tracing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from flax import nnx

from gpipe_jax.layers import batch_norm, constants
from gpipe_jax.layers.constants import Constant, UnfitModuleError
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.numeric_settings import cached_by_settings
from gpipe_jax.layers.sources.arguments import brief, takes
from gpipe_jax.utils.trees import PyTree


class Template(NamedTuple):
    """Hold the static half of a module: its graph in both modes, and the shapes of its arrays."""

    params: PyTree  # as `jax.ShapeDtypeStruct`s
    stats: PyTree  # likewise
    train: nnx.GraphDef
    evaluate: nnx.GraphDef
    rng_state: tuple[tuple[tuple, type], ...]  # paths and types of its random streams
    norms: tuple[batch_norm.Norm, ...]
    constants: Sequence[Constant]  # arrays that are not variables


@dataclass(frozen=True)
class ModuleLayer(Layer):
    """Describe a layer by an `nnx.Module` class and the arguments to build it with."""

    module: type[nnx.Module]
    kwargs: tuple[tuple[str, Any], ...]
    types: tuple  # of the arguments: layers with arguments 1 and True differ

    def build(self, key: jax.Array) -> nnx.Module:
        """Build the module, with all its parameters."""
        rngs = {"rngs": nnx.Rngs(key)} if takes(self.module.__init__, "rngs") else {}
        return self.module(**dict(self.kwargs), **rngs)

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        del x  # nnx modules know the shape of their input
        module = self.build(key)
        constants.take(module)
        return nnx.to_pure_dict(nnx.split(module, nnx.Param, ...)[1])

    def init_statistics(self) -> PyTree:
        return batch_norm.fresh(_template(self).stats)

    def shapes(self, x: PyTree) -> tuple[PyTree, PyTree]:
        del x
        return _template(self).params, _template(self).stats

    def apply(
        self, params: PyTree, stats: PyTree, x: PyTree, context: Context
    ) -> tuple[PyTree, PyTree]:
        template, key = _template(self), context.key
        streams = [
            (path, _stream_value(kind, key, i)) for i, (path, kind) in enumerate(template.rng_state)
        ]
        graph = template.train if context.train else template.evaluate
        rng_state = nnx.to_pure_dict(nnx.from_flat_state(streams))
        module = nnx.merge(graph, params, stats, rng_state)
        values = constants.put(module, template.constants)
        options = {"rngs": nnx.Rngs(key), "progress": context.progress}
        call = self.module.__call__
        y = module(x, **{name: value for name, value in options.items() if takes(call, name)})
        constants.check_unchanged(module, template.constants, values)
        if not (context.train and template.norms):
            return y, {}
        batch_stats = nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))
        return y, batch_norm.moments(template.norms, stats, batch_stats)

    def commit(self, stats: PyTree, moments: PyTree) -> PyTree:
        return batch_norm.commit(_template(self).norms, stats, moments)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={brief(value)}" for name, value in self.kwargs)
        return self.linked(f"{self.module.__name__}({arguments})")


def _stream_value(kind: type, key: jax.Array, i: int) -> nnx.Variable:
    value = jax.random.fold_in(key, i) if issubclass(kind, nnx.RngKey) else jax.numpy.uint32(0)
    return kind(value)


@cached_by_settings(maxsize=4096)
def _template(description: ModuleLayer) -> Template:
    """Build the module abstractly, without any array but constants, and split it."""
    taken = []

    def build() -> nnx.Module:
        module = description.build(jax.random.key(0))
        taken.extend(constants.take(module))
        return module

    module = nnx.eval_shape(build)
    values = constants.compute(description.build, str(description)) if taken else []
    norms = batch_norm.prepare(module, str(description))
    kinds = (nnx.Param, nnx.BatchStat, nnx.RngState, ...)
    train, params, stats, rng_state, rest = nnx.split(module, *kinds)
    unknown = nnx.to_flat_state(rest)
    if unknown:
        types = ", ".join(sorted({type(v).__name__ for _, v in unknown}))
        raise UnfitModuleError(
            f"{description} has variables of type {types}; a pipeline layer may hold "
            f"nnx.Param, random streams, the statistics of nnx.BatchNorm, and constant arrays that "
            f"are plain attributes"
        )
    module.eval()
    evaluate = nnx.split(module, nnx.Param, ...)[0]
    flat = tuple((path, type(variable)) for path, variable in nnx.to_flat_state(rng_state))
    pure_params, pure_stats = (nnx.to_pure_dict(state) for state in (params, stats))
    return Template(pure_params, pure_stats, train, evaluate, flat, norms, values)
