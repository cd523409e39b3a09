"""The cells of an interpreted network in order, and where their numbers are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpipe_jax.genotypes.genotype import INPUTS
from gpipe_jax.utils.trees import PyTree
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from nas.training.interpreter.cell import Body
from nas.training.interpreter.encoding import Code, Concat, whole
from nas.training.interpreter.inputs import InputReader

STEM = 3
"""The stem is as wide as so many states of the first cell."""


class Spot(NamedTuple):
    """One cell of a network."""

    kind: str  # "first", "normal" or "reduction"
    body: Body
    enter: InputReader
    match: InputReader | None  # the first cell has none
    sources: tuple[str, str]  # whose outputs these read: "stem", "normal" or "reduction"


def make_spots(
    cells: int, filters: int, operations: tuple[str, ...], pairs: int, norm: Normalization
) -> list[Spot]:
    """All cells, for so many normal ones in each of the three stacks."""
    normal = ["normal"] * cells
    kinds = ["first", *normal[1:], "reduction", *normal, "reduction", *normal]
    outputs = [("stem", filters, STEM)] * 2  # (what, features, states) of those made so far
    spots, features = [], filters
    for i, kind in enumerate(kinds):
        features = 2 * features if kind == "reduction" else features
        (skip, skip_features, skip_states), (x, x_features, x_states) = outputs[-2:]
        halve = i > 0 and kinds[i - 1] == "reduction"
        optional = not halve and skip != "stem"
        match = InputReader(skip_states, skip_features, features, norm, halve, optional)
        spots.append(
            Spot(
                kind,
                Body(kind, operations, pairs, features, norm),
                InputReader(x_states, x_features, features, norm),
                None if kind == "first" else match,
                (x, skip),
            )
        )
        outputs.append(("normal" if kind == "first" else kind, features, INPUTS + pairs))
    return spots


def concat_of(code: Code, source: str) -> Concat:
    """What is concatenated there."""
    return whole(STEM) if source == "stem" else getattr(code, source).concat


# --- the tree of parameters, or of statistics -----------------------------------------------------


def join(spots: list[Spot], cells: list[PyTree]) -> PyTree:
    """{"first", "stacks", "reductions"} from {"enter", "match", "body"} of each cell.

    Of the cells of a stack, arrays have them along the first axis; but the match of the first one
    differs from the others', and is apart.
    """
    of = lambda kind: [cells[i] for i, spot in enumerate(spots) if spot.kind == kind]  # noqa: E731
    stacks = tuple(_join_stack([cells[i] for i in run]) for run in _runs(spots))
    return {"first": of("first")[0], "stacks": stacks, "reductions": tuple(of("reduction"))}


def _join_stack(cells: list[PyTree]) -> PyTree:
    if not cells:
        return {}
    stack = {name: stacked([cell[name] for cell in cells]) for name in ("enter", "body")}
    if len(cells) > 1:
        stack["match"] = stacked([cell["match"] for cell in cells[1:]])
    return {**stack, "start": cells[0]["match"]}


def split(spots: list[Spot], tree: PyTree) -> list[PyTree]:
    """The inverse of `join`."""
    cells: list[PyTree] = [{}] * len(spots)
    cells[0] = tree["first"]
    reductions = [i for i, spot in enumerate(spots) if spot.kind == "reduction"]
    for i, cell in zip(reductions, tree["reductions"], strict=True):
        cells[i] = cell
    for run, stack in zip(_runs(spots), tree["stacks"], strict=True):
        for k, i in enumerate(run):
            cells[i] = {name: _at(stack[name], k) for name in ("enter", "body")}
            cells[i]["match"] = _at(stack["match"], k - 1) if k else stack["start"]
    return cells


def _runs(spots: list[Spot]) -> list[list[int]]:
    """The normal cells of each of the three stacks, but for the network's first."""
    runs: list[list[int]] = [[]]
    for i, spot in enumerate(spots):
        if spot.kind == "reduction":
            runs.append([])
        elif spot.kind == "normal":
            runs[-1].append(i)
    return runs


def stacked(trees: list[PyTree]) -> PyTree:
    """Arrays along a new first axis."""
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def _at(tree: PyTree, i: int) -> PyTree:
    return jax.tree.map(lambda a: a[i], tree)
