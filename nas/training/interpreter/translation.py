"""The same network's values in both forms: the interpreter's, and those of the layers.

So that both builders can be compared, from the same values. `Static`'s are those of a pipeline's
layers; `nas export` hands on no trained values, but the architecture alone.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gpipe_jax.genotypes.genotype import INPUTS, Cell, Genotype
from nas.training.interpreter import parameter_table, structure
from nas.training.interpreter.network import Interpreter
from nas.training.interpreter.operation_union import flatten, unflatten
from nas.training.interpreter.structure import STEM, Spot
from nas.training.network import PyTree, Variables
from nas.training.static import Static


def to_static(interpreter: Interpreter, genotype: Genotype, values: PyTree) -> Any:
    """The values that `Static` has for the same network; as well for gradients, or the like."""
    static = Static(interpreter.shape)
    architecture = static.encode(genotype)
    likes = zip(*(layer.shapes(None) for layer in static.layers(architecture)), strict=True)
    return Variables(
        *(
            _layers(interpreter, genotype, tree, list(like), side)
            for side, (tree, like) in enumerate(zip(values, likes, strict=True))
        )
    )


def from_static(interpreter: Interpreter, genotype: Genotype, values: Variables) -> Variables:
    """The values that the interpreter has for the same network; its padding is zero."""
    found = interpreter.entries(interpreter.encode(genotype))
    dtype = jax.tree.leaves(values)[0].dtype
    blank = [
        jax.tree.map(lambda a: a.astype(dtype), parameter_table.starts(tree)) for tree in found
    ]
    return Variables(
        *(
            _tree(interpreter, genotype, start, layers)
            for start, layers in zip(blank, values, strict=True)
        )
    )


def _layers(
    interpreter: Interpreter, genotype: Genotype, tree: PyTree, likes: list[PyTree], side: int
) -> tuple[PyTree, ...]:
    cells = structure.split(interpreter.spots, tree)
    spots = interpreter.spots
    found = [tree["stem"]]
    for spot, cell in zip(spots, cells, strict=True):
        found.append(_cell_to_static(spot, genotype, cell, side))
    found.append(_rows(genotype.normal.concat, tree["classifier"], _pick))
    return tuple(_like(a, b) for a, b in zip(likes, found, strict=True))


def _tree(interpreter: Interpreter, genotype: Genotype, blank: PyTree, layers: PyTree) -> PyTree:
    spots = interpreter.spots
    stem, *cells, classifier = layers
    blanks = structure.split(spots, blank)
    found = [
        _cell_from_static(spot, genotype, start, cell)
        for spot, start, cell in zip(spots, blanks, cells, strict=True)
    ]
    put = lambda concat, a: _put(INPUTS + interpreter.pairs, concat, a)  # noqa: E731
    end = _rows(genotype.normal.concat, classifier, put)
    return {**structure.join(spots, found), "stem": stem, "classifier": end}


def _like(like: PyTree, tree: PyTree) -> PyTree:
    """The part of a tree that is in `like`."""

    def one(path: tuple, a: Any) -> jax.Array:
        found = tree
        for key in path:
            found = found[key.key]
        return found.reshape(a.shape)

    return jax.tree.map_with_path(one, like)


# --- cells ----------------------------------------------------------------------------------------


def _own(spot: Spot, genotype: Genotype) -> Cell:
    return genotype.reduction if spot.kind == "reduction" else genotype.normal


def _concat(genotype: Genotype, source: str) -> tuple[int, ...]:
    return tuple(range(STEM)) if source == "stem" else getattr(genotype, source).concat


def _slots(spot: Spot, genotype: Genotype) -> list[int]:
    """The layer of the union that each slot has."""
    groups, operations = spot.body.groups, spot.body.operations
    group = {state: g for g, (states, _, _) in enumerate(groups) for state in states}
    elements = [element for pair in _own(spot, genotype).pairs for element in pair]
    return [group[state] * len(operations) + operations.index(name) for name, state in elements]


def _cell_to_static(spot: Spot, genotype: Genotype, cell: PyTree, side: int) -> PyTree:
    body, found = cell["body"], {}
    for name, source in zip(("enter", "match"), spot.sources, strict=True):
        if name in cell:
            found[name] = _rows(_concat(genotype, source), cell[name], _pick)
    union, output = spot.body.union, spot.body.output
    found["operations"] = {
        j: unflatten(union.shapes[i][side], body["slots"][j]).get("chosen", {})
        for j, i in enumerate(_slots(spot, genotype))
    }
    found["outputs"] = {
        k: unflatten(output.shapes[1][side], body["outputs"][spot.body.matched.index(state)])
        for k, state in enumerate(_own(spot, genotype).concat)
        if state in spot.body.matched
    }
    return found


def _cell_from_static(spot: Spot, genotype: Genotype, blank: PyTree, layer: PyTree) -> PyTree:
    found, body = dict(blank), dict(blank["body"])
    for name, reader, source in zip(
        ("enter", "match"), (spot.enter, spot.match), spot.sources, strict=True
    ):
        if reader is not None and layer.get(name):
            put = lambda concat, a, n=reader.states: _put(n, concat, a)  # noqa: E731
            found[name] = _rows(_concat(genotype, source), layer[name], put)
    operations = layer.get("operations", {})
    for j in range(2 * spot.body.pairs):
        body["slots"] = _fill(body["slots"], j, operations.get(j, {}))
    for k, tree in layer.get("outputs", {}).items():
        place = spot.body.matched.index(_own(spot, genotype).concat[k])
        body["outputs"] = _fill(body["outputs"], place, tree)
    return {**found, "body": body}


def _fill(vectors: jax.Array, j: int, tree: PyTree) -> jax.Array:
    """The vectors with the numbers of a layer at the start of vector j."""
    new = flatten(tree, vectors.dtype)
    return vectors.at[j, : len(new)].set(new)


# --- rows of projections --------------------------------------------------------------------------


def _rows(concat: tuple[int, ...], tree: PyTree, change: Any) -> PyTree:
    """The tree with `change(concat, kernel)` of its kernels, which read a concatenation."""

    def one(path: tuple, a: jax.Array) -> jax.Array:
        return change(concat, a) if path[-1].key in ("kernel", "even", "odd") else a

    return jax.tree.map_with_path(one, tree)


def _pick(concat: tuple[int, ...], kernel: jax.Array) -> jax.Array:
    return kernel[jnp.array(concat)].reshape(-1, kernel.shape[-1])


def _put(states: int, concat: tuple[int, ...], kernel: jax.Array) -> jax.Array:
    rows = kernel.reshape(len(concat), -1, kernel.shape[-1])
    return jnp.zeros((states, *rows.shape[1:]), kernel.dtype).at[jnp.array(concat)].set(rows)
