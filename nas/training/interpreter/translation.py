"""Translate the values of a network between the interpreter's form and that of `Static`.

Tests and benchmarks compare both builders this way, from the same values. Those of `Static` are the
values of a pipeline's layers; `nas export` writes architectures only, no weights.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gpipe_jax.genotypes.genotype import INPUTS, Genotype
from nas.training.interpreter import parameter_table, structure
from nas.training.interpreter.cell import STEM_STATES
from nas.training.interpreter.inputs import InputProjection
from nas.training.interpreter.network import Interpreter
from nas.training.interpreter.operation_union import flatten, unflatten
from nas.training.interpreter.structure import CellPosition
from nas.training.network import PyTree, Variables
from nas.training.static import Static

PROJECTION_KERNELS = ("kernel", "even", "odd")


def to_static(interpreter: Interpreter, genotype: Genotype, values: PyTree) -> Variables:
    """Return the values of the same network as `Static` has them.

    `values` is a pair of trees for parameters and statistics; gradients and the like will do.
    """
    static = Static(interpreter.shape)
    layers = static.layers(static.encode(genotype))
    parameter_shapes, statistics_shapes = zip(
        *(layer.shapes(None) for layer in layers), strict=True
    )
    parameters, statistics = values
    return Variables(
        _network_to_static(interpreter, genotype, parameters, parameter_shapes, 0),
        _network_to_static(interpreter, genotype, statistics, statistics_shapes, 1),
    )


def from_static(interpreter: Interpreter, genotype: Genotype, values: Variables) -> Variables:
    """Return the values of the same network as the interpreter has them, with padding zero."""
    dtype = jax.tree.leaves(values)[0].dtype
    translated = []
    for tables, layers in zip(
        interpreter.tables(interpreter.encode(genotype)), values, strict=True
    ):
        blank = jax.tree.map(lambda a: a.astype(dtype), parameter_table.starts(tables))
        translated.append(_network_from_static(interpreter, genotype, blank, layers))
    return Variables(*translated)


def _network_to_static(
    interpreter: Interpreter,
    genotype: Genotype,
    tree: PyTree,
    shapes: tuple[PyTree, ...],
    which: int,
) -> tuple[PyTree, ...]:
    """Return the trees of the layers; `which` is 0 for parameters and 1 for statistics."""
    positions = interpreter.positions
    cells = structure.split_cells(positions, tree)
    layers = [
        tree["stem"],
        *(
            _cell_to_static(position, genotype, cell, which)
            for position, cell in zip(positions, cells, strict=True)
        ),
        _map_kernels(tree["classifier"], genotype.normal.concat, _pick_rows),
    ]
    return tuple(_select_shapes(*each) for each in zip(shapes, layers, strict=True))


def _network_from_static(
    interpreter: Interpreter, genotype: Genotype, blank: PyTree, layers: PyTree
) -> PyTree:
    positions = interpreter.positions
    stem, *cell_layers, classifier = layers
    blanks = structure.split_cells(positions, blank)
    cells = [
        _cell_from_static(position, genotype, blank_cell, cell_layer)
        for position, blank_cell, cell_layer in zip(positions, blanks, cell_layers, strict=True)
    ]
    put_rows = _row_putter(INPUTS + interpreter.pairs)
    linear = _map_kernels(classifier, genotype.normal.concat, put_rows)
    return {**structure.join_cells(positions, cells), "stem": stem, "classifier": linear}


def _select_shapes(shapes: PyTree, tree: PyTree) -> PyTree:
    """Return the arrays of a tree that are in `shapes`, in those shapes."""

    def select(path: tuple, shape: Any) -> jax.Array:
        a = tree
        for key in path:
            a = a[key.key]
        return a.reshape(shape.shape)

    return jax.tree.map_with_path(select, shapes)


# --- cells ----------------------------------------------------------------------------------------


def _concat(genotype: Genotype, source: str) -> tuple[int, ...]:
    """Return the states that are concatenated in an output of this kind."""
    if source == "stem":
        return tuple(range(STEM_STATES))
    return (genotype.reduction if source == "reduction" else genotype.normal).concat


def _projections(
    position: CellPosition,
) -> list[tuple[str, InputProjection, str]]:
    """Return (name, projection, source) of those that the cell has."""
    projections = [("enter", position.enter, position.enter_source)]
    if position.match is not None:
        projections.append(("match", position.match, position.match_source))
    return projections


def _union_indices(position: CellPosition, genotype: Genotype) -> list[int]:
    """Return the index, in the cell's union, of the layer that each slot has."""
    groups, operations = position.body.groups, position.body.operations
    group_of = {state: g for g, group in enumerate(groups) for state in group.states}
    slots = [slot for pair in _own(position, genotype).pairs for slot in pair]
    return [group_of[state] * len(operations) + operations.index(name) for name, state in slots]


def _own(position: CellPosition, genotype: Genotype) -> Any:
    return genotype.reduction if position.kind == "reduction" else genotype.normal


def _cell_to_static(position: CellPosition, genotype: Genotype, cell: PyTree, which: int) -> PyTree:
    layer = {
        name: _map_kernels(cell[name], _concat(genotype, source), _pick_rows)
        for name, _, source in _projections(position)
    }
    body, vectors = position.body, cell["body"]
    layer["operations"] = {
        j: unflatten(body.union.shapes[i][which], vectors["slots"][j]).get("chosen", {})
        for j, i in enumerate(_union_indices(position, genotype))
    }
    change_shapes = body.output_union.shapes[1][which]
    layer["outputs"] = {
        k: unflatten(change_shapes, vectors["outputs"][body.changed_inputs.index(state)])
        for k, state in enumerate(_own(position, genotype).concat)
        if state in body.changed_inputs
    }
    return layer


def _cell_from_static(
    position: CellPosition, genotype: Genotype, blank: PyTree, layer: PyTree
) -> PyTree:
    cell = {**blank, "body": dict(blank["body"])}
    for name, projection, source in _projections(position):
        if layer.get(name):
            put_rows = _row_putter(projection.states)
            cell[name] = _map_kernels(layer[name], _concat(genotype, source), put_rows)
    vectors = cell["body"]
    operations = layer.get("operations", {})
    for j in range(2 * position.body.pairs):
        vectors["slots"] = _fill(vectors["slots"], j, operations.get(j, {}))
    for k, tree in layer.get("outputs", {}).items():
        state = _own(position, genotype).concat[k]
        row = position.body.changed_inputs.index(state)
        vectors["outputs"] = _fill(vectors["outputs"], row, tree)
    return cell


def _fill(vectors: jax.Array, j: int, tree: PyTree) -> jax.Array:
    """Return the vectors with the values of a layer at the start of vector j."""
    values = flatten(tree, vectors.dtype)
    return vectors.at[j, : len(values)].set(values)


# --- rows of projections --------------------------------------------------------------------------

RowChange = Callable[[tuple[int, ...], jax.Array], jax.Array]


def _map_kernels(tree: PyTree, concat: tuple[int, ...], change: RowChange) -> PyTree:
    """Return the tree with `change(concat, kernel)` of its kernels, which read a concatenation."""

    def change_if_kernel(path: tuple, a: jax.Array) -> jax.Array:
        return change(concat, a) if path[-1].key in PROJECTION_KERNELS else a

    return jax.tree.map_with_path(change_if_kernel, tree)


def _pick_rows(concat: tuple[int, ...], kernel: jax.Array) -> jax.Array:
    return kernel[jnp.array(concat)].reshape(-1, kernel.shape[-1])


def _row_putter(states: int) -> RowChange:
    """Return the inverse of `_pick_rows` for a buffer of so many states."""

    def put_rows(concat: tuple[int, ...], kernel: jax.Array) -> jax.Array:
        rows = kernel.reshape(len(concat), -1, kernel.shape[-1])
        empty = jnp.zeros((states, *rows.shape[1:]), kernel.dtype)
        return empty.at[jnp.array(concat)].set(rows)

    return put_rows
