"""Translate the values of a network between the interpreter's form and that of `Static`.

Tests and benchmarks compare both builders this way, from the same values. Those of `Static` are the
values of a pipeline's layers; `nas export` writes architectures only, no weights.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpipe_jax.genotypes.genotype import INPUTS, Genotype
from nas.training.interpreter import parameter_table, structure
from nas.training.interpreter.cell import STEM_STATES
from nas.training.interpreter.network import Interpreter
from nas.training.interpreter.operation_union import flatten, unflatten
from nas.training.interpreter.structure import CellPosition, OutputKind
from nas.training.network import PyTree, Variables
from nas.training.static import Static

PROJECTION_KERNELS = ("kernel", "even", "odd")


class CellShapes(NamedTuple):
    """Hold the shapes of the layers that a cell chooses from, of parameters or of statistics."""

    operations: tuple[PyTree, ...]  # of each layer of the union
    output: PyTree  # of the layer that changes an input for the cell's output


def to_static(interpreter: Interpreter, genotype: Genotype, values: PyTree) -> Variables:
    """Return the values of the same network as `Static` has them.

    `values` is a pair of trees of the form of parameters and statistics; gradients have it too.
    """
    static = Static(interpreter.shape)
    layers = static.layers(static.encode(genotype))
    # Each has two elements: of parameters, and of statistics.
    layer_shapes = zip(*(layer.shapes(None) for layer in layers), strict=True)
    cell_shapes = zip(*map(_cell_shapes, interpreter.positions), strict=True)
    trees = zip(values, layer_shapes, cell_shapes, strict=True)
    return Variables(*(_network_to_static(interpreter, genotype, *each) for each in trees))


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
    layer_shapes: tuple[PyTree, ...],
    cell_shapes: tuple[CellShapes, ...],
) -> tuple[PyTree, ...]:
    """Return the trees of the layers of `Static`, of parameters or of statistics."""
    positions = interpreter.positions
    cells = structure.split_cells(positions, tree)
    layers = [
        tree["stem"],
        *(
            _cell_to_static(position, genotype, cell, shapes)
            for position, cell, shapes in zip(positions, cells, cell_shapes, strict=True)
        ),
        _map_kernels(tree["classifier"], genotype.normal.concat, _pick_rows),
    ]
    return tuple(_select_shapes(*each) for each in zip(layer_shapes, layers, strict=True))


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


def _cell_shapes(position: CellPosition) -> tuple[CellShapes, CellShapes]:
    """Return the shapes of parameters and of statistics."""
    parameters, statistics = zip(*position.body.union.shapes, strict=True)
    output_parameters, output_statistics = position.body.output_union.shapes[1]
    return CellShapes(parameters, output_parameters), CellShapes(statistics, output_statistics)


def _source_concat(genotype: Genotype, source: OutputKind) -> tuple[int, ...]:
    return structure.source_concat(genotype, source, stem=tuple(range(STEM_STATES)))


def _union_indices(position: CellPosition, genotype: Genotype) -> list[int]:
    """Return the index, in the cell's union, of the layer that each slot has."""
    groups, operations = position.body.groups, position.body.operations
    group_of = {state: g for g, group in enumerate(groups) for state in group.states}
    slots = [slot for pair in position.own(genotype).pairs for slot in pair]
    return [group_of[state] * len(operations) + operations.index(name) for name, state in slots]


def _cell_to_static(
    position: CellPosition, genotype: Genotype, cell: PyTree, shapes: CellShapes
) -> PyTree:
    layer: dict[str, PyTree] = {
        name: _map_kernels(cell[name], _source_concat(genotype, source), _pick_rows)
        for name, _, source in position.projections()
    }
    body, vectors = position.body, cell["body"]
    layer["operations"] = {
        j: unflatten(shapes.operations[i], vectors["slots"][j]).get("chosen", {})
        for j, i in enumerate(_union_indices(position, genotype))
    }
    layer["outputs"] = {
        k: unflatten(shapes.output, vectors["outputs"][body.changed_inputs.index(state)])
        for k, state in enumerate(position.own(genotype).concat)
        if state in body.changed_inputs
    }
    return layer


def _cell_from_static(
    position: CellPosition, genotype: Genotype, blank: PyTree, layer: PyTree
) -> PyTree:
    cell = {**blank, "body": dict(blank["body"])}
    for name, projection, source in position.projections():
        if layer.get(name):
            put_rows = _row_putter(projection.states)
            cell[name] = _map_kernels(layer[name], _source_concat(genotype, source), put_rows)
    vectors = cell["body"]
    operations = layer.get("operations", {})
    for j in range(2 * position.body.pairs):
        vectors["slots"] = _fill(vectors["slots"], j, operations.get(j, {}))
    for k, tree in layer.get("outputs", {}).items():
        state = position.own(genotype).concat[k]
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
    """Return the inverse of `_pick_rows` for a buffer of this number of states."""

    def put_rows(concat: tuple[int, ...], kernel: jax.Array) -> jax.Array:
        rows = kernel.reshape(len(concat), -1, kernel.shape[-1])
        empty = jnp.zeros((states, *rows.shape[1:]), kernel.dtype)
        return empty.at[jnp.array(concat)].set(rows)

    return put_rows
