"""Start a network with the parameters of another one, as far as names and shapes match."""

from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import jax
import numpy as np

from gpipe_jax.checkpoint.sources import Arrays, arrays_of
from gpipe_jax.data import casts
from gpipe_jax.distributed import host_arrays
from gpipe_jax.errors import ArgumentError
from gpipe_jax.pipeline import state as states
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.ragged import layer_trees
from gpipe_jax.pipeline.state import State
from gpipe_jax.utils.text import did_you_mean
from gpipe_jax.utils.trees import PyTree, by_name, merge, path_name, select

_MOST_SHOWN = 8  # names in a line of a report

Shape = tuple[int, ...]


class WarmStart(NamedTuple):
    """Hold a state with the parameters of another network, and a report of what matched.

    `print` shows the report. Names are those of the pipeline, such as "3.linear.kernel"; names in
    `unused` are those of the source.

    Attributes:
        state: The state, for `Trainer.start`.
        matched: What was taken from the source.
        missing: What the source does not have; it has its initial value.
        unused: What the source has, and the pipeline has not.
        different: Where the shapes differ: (of the source, of the pipeline). It has its initial
            value.

    Example::

        warm = gpipe.warm_start(pipe, pipe.to_layers(pipe.init(seed=1)))
        print(warm)
        current = trainer.start(warm.state)
    """

    state: State
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    different: Mapping[str, tuple[Shape, Shape]]

    def __str__(self) -> str:
        count = len(self.matched) + len(self.missing) + len(self.different)
        lines = _report(self.missing, self.unused, self.different)
        return "\n".join([f"{len(self.matched)} of {count} arrays taken", *lines])


def _report(
    missing: Sequence[str], unused: Sequence[str], different: Mapping[str, tuple[Shape, Shape]]
) -> list[str]:
    """Return one line for each kind of mismatch."""
    shapes = [f"{name} {a} there, {b} here" for name, (a, b) in different.items()]
    kinds = {
        "other shapes, so initial values": shapes,
        "not there, so initial values": missing,
        "not here, so unused": unused,
    }
    return [f"{kind}: {_list(entries)}" for kind, entries in kinds.items() if entries]


def _list(entries: Any) -> str:
    more = len(entries) - _MOST_SHOWN
    return ", ".join(entries[:_MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def warm_start(
    pipe: Pipeline,
    source: str | PathLike[str] | list | Mapping | Any,
    *,
    seed: int = 0,
    rename: Mapping[str, str] | None = None,
    strict: bool = False,
) -> WarmStart:
    """Initialize a pipeline, with the parameters of another network where names and shapes match.

    A name is the index of the layer and the path in it: "3.linear.kernel". Running statistics are
    taken too. From a checkpoint with a moving average, the average is taken. Types may differ.

    Args:
        pipe: The pipeline.
        source: The path of a run, of a folder of `Trainer.save`, of one checkpoint there, or of a
            file of `gpipe export`; or trees in memory: a list of one for each layer, as of
            `to_layers`, a dict of arrays by name, or an `nnx.Module`.
        seed: Seed of the other parameters, and of all randomness in training. Default: 0.
        rename: New beginnings of names by those of the source, whole parts of the name:
            {"4": "5"} for a layer that has moved. The longest one counts. Default: none.
        strict: Whether everything in the pipeline must match. Default: False.

    Returns:
        The state and the report.

    Raises:
        ArgumentError: Nothing matches; or, with `strict`, not everything does; or `rename` names
            nothing of the source; or there is no such checkpoint.

    Example::

        body, head = pipe.to_layers(pipe.init(seed=1))
        old = {"body": body, "head": head}
        print(gpipe.warm_start(pipe, old, rename={"body": "0", "head": "1"}))
    """
    return named("source", pipe, source, seed=seed, rename=rename or {}, strict=strict)


def named(
    argument: str,
    pipe: Pipeline,
    source: Any,
    *,
    seed: int,
    rename: Mapping[str, str],
    strict: bool = False,
) -> WarmStart:
    """Do as `warm_start`; messages name the argument or setting of the source."""
    if not isinstance(pipe, Pipeline):
        raise ArgumentError(
            "pipe",
            f"`pipe` must be a Pipeline, got {type(pipe).__name__}; of a trainer, give "
            f"trainer.pipe",
        )
    _check_rename(rename)
    given = _renamed(arrays_of(argument, source), rename)
    shapes = _shapes(pipe)
    matched = tuple(name for name, shape in shapes.items() if given.shapes.get(name) == shape)
    different = {
        name: (given.shapes[name], shape)
        for name, shape in shapes.items()
        if name in given.shapes and name not in matched
    }
    missing = tuple(name for name in shapes if name not in given.shapes)
    unused = tuple(name for name in given.shapes if name not in shapes)
    if not matched or (strict and len(matched) < len(shapes)):
        rule = "with `strict`, all arrays of the pipeline must match" if matched else ""
        raise ArgumentError(
            argument,
            f"{rule or f'nothing of `{argument}` matches the pipeline'}: "
            f"{'; '.join(_report(missing, unused, different))}; give another source, or (in "
            f"Python) `rename`",
        )
    state = _replaced(pipe, pipe.init(seed), set(matched), given)
    return WarmStart(state, matched, missing, unused, different)


def _check_rename(rename: Any) -> None:
    names = [*rename, *rename.values()] if isinstance(rename, Mapping) else [rename]
    for name in names:
        if not isinstance(name, str):
            raise ArgumentError(
                "rename",
                f"`rename` must be a dict from old beginnings of names to new ones, as "
                f"{{'4': '5'}}, got {name!r}",
            )


def _renamed(arrays: Arrays, rename: Mapping[str, str]) -> Arrays:
    """Return the arrays under their new names."""
    used, old_names = set[str](), dict[str, str]()
    for name in arrays.shapes:
        fitting = [old for old in rename if f"{name}.".startswith(f"{old}.")]
        old = max(fitting, key=len, default=None)
        new = name if old is None else rename[old] + name[len(old) :]
        used.update(fitting)
        if new in old_names:
            raise ArgumentError(
                "rename",
                f"`rename` gives {old_names[new]} and {name} the same name {new}; rename both",
            )
        old_names[new] = name
    if unused := [old for old in rename if old not in used]:
        parts = Counter(name.rpartition(".")[0] for name in arrays.shapes)
        raise ArgumentError(
            "rename",
            f"`rename` has {unused[0]!r}, with which no name of the source begins"
            f"{did_you_mean(unused[0], [*parts, *arrays.shapes])}; its names begin with "
            f"{_list(sorted({name.partition('.')[0] for name in arrays.shapes}))}",
        )
    shapes = {new: arrays.shapes[old] for new, old in old_names.items()}
    return Arrays(shapes, lambda new: arrays.read(old_names[new]))


def _shapes(pipe: Pipeline) -> dict[str, Shape]:
    """Return the shapes of all parameters and statistics of a pipeline, by name."""
    return {
        f"{i}.{name}": tuple(a.shape)
        for i, shape in enumerate(pipe.shapes)
        for tree in (shape.own_params, shape.stats)
        for name, a in by_name(tree).items()
    }


def _replaced(pipe: Pipeline, state: State, matched: set[str], given: Arrays) -> State:
    """Return a state with the matching arrays; read those of this process's layers only."""
    stages, mesh = pipe.stages, pipe.mesh
    storages = {"params": stages.params, "stats": stages.stats, "fixed": stages.fixed}
    arrays = {name: getattr(state, name) for name in storages}
    layers = layer_trees.split(mesh, host_arrays.local_rows(mesh), storages, arrays)

    def replaced(i: int, tree: PyTree) -> PyTree:
        def new(path: tuple, old: np.ndarray) -> np.ndarray:
            name = f"{i}.{path_name(path)}"
            if name not in matched:
                return old
            return casts.cast(f"{name} of the source", np.asarray(given.read(name)), old.dtype)

        return jax.tree.map_with_path(new, tree)

    def layer(i: int) -> dict[str, PyTree]:
        old, shape = layers[i], pipe.shapes[i]
        own = replaced(i, merge(old["params"], old["fixed"].params))
        fixed = old["fixed"]._replace(params=select(shape.fixed.params, own))
        stats = replaced(i, old["stats"])
        return {"params": select(shape.params, own), "stats": stats, "fixed": fixed}

    local = {name: getattr(states.local_shapes(stages), name) for name in storages}
    return state._replace(**layer_trees.join(mesh, storages, layer, local))
