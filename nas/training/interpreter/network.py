"""All networks of a cell space in one program: the architecture is data.

The networks are those of `Static` with the stem "cifar". What is written there for each cell of an
architecture is written here once for each kind of cell, and loops go over the slots of a cell and
over the cells of a stack. So a search compiles once, whatever it proposes; a step takes about as
long as that of the architecture's own program, because only what is chosen is computed.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gpipe_jax.genotypes.genotype import INPUTS, PAPER_OPERATIONS, Genotype
from gpipe_jax.layers.layer import Layer, layer
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from gpipe_jax.zoo.amoebanet.layers import Classifier, Stem
from nas.training.interpreter import encoding, parameter_table, structure
from nas.training.interpreter.encoding import Code, Concat
from nas.training.interpreter.operation_union import call
from nas.training.interpreter.structure import STEM, Spot
from nas.training.network import PyTree, Shape, Variables
from nas.training.static import Static


class Buffer(NamedTuple):
    """A cell's output: the states [S, B, H, W, F], and which of them are concatenated."""

    concat: Concat
    states: jax.Array


@dataclass(frozen=True)
class Interpreter:
    """One program for all architectures of so many `pairs` of these `operations`.

    Parameters are a dict: "stem", "first" (cell), "stacks", "reductions" and "classifier"; see
    `spots.join`. `translate` has them as `Static` does.
    """

    shape: Shape
    operations: tuple[str, ...] = PAPER_OPERATIONS
    pairs: int = 5

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))
        if self.shape.stem != "cifar":
            raise ValueError(
                f"`stem` is {self.shape.stem!r}, but the interpreter knows only 'cifar'; use that"
            )

    def encode(self, genotype: Genotype) -> Code:
        """The genotype as integer arrays; ValueError if it is not of these operations and pairs."""
        Static(self.shape).encode(genotype)  # for its errors
        return encoding.encode(genotype, self.operations, self.pairs)

    # --- the parts --------------------------------------------------------------------------------

    @functools.cached_property
    def stem(self) -> Layer:
        """Images to features."""
        shape, norm = self.shape, Normalization(self.shape.batch_norm_momentum)
        return layer(
            Stem, in_features=shape.channels, features=STEM * shape.filters, dtype=shape.dtype,
            norm=norm, stride=1, padding="SAME",
        )  # fmt: skip

    @functools.cached_property
    def spots(self) -> list[Spot]:
        """The cells."""
        norm = Normalization(self.shape.batch_norm_momentum)
        return structure.make_spots(
            self.shape.cells_per_stack, self.shape.filters, self.operations, self.pairs, norm
        )

    @functools.cached_property
    def classifier(self) -> Layer:
        """All states of the last cell to scores."""
        width = (INPUTS + self.pairs) * self.spots[-1].body.features
        return layer(Classifier, in_features=width, classes=self.shape.classes)

    def entries(self, architecture: Code) -> tuple[PyTree, PyTree]:
        """What the network's parameters and statistics are, see `entries.Entries`."""
        cells = [_cell_entries(spot, architecture) for spot in self.spots]
        parameters, statistics = (
            structure.join(self.spots, list(a)) for a in zip(*cells, strict=True)
        )
        for name, part in (("stem", self.stem), ("classifier", self.classifier)):
            parameters[name], statistics[name] = map(parameter_table.entries, part.shapes(None))
        linear, states = parameters["classifier"]["linear"], INPUTS + self.pairs
        apart = [a.reshape(states, -1, a.shape[-1]) for a in linear["kernel"]]
        linear["kernel"] = parameter_table.Entries(*apart).masked(
            architecture.normal.concat.members()
        )
        return parameters, statistics

    # --- Network ----------------------------------------------------------------------------------

    def init(self, architecture: Code, key: jax.Array) -> Variables:
        """Fresh values, distributed as those of `Static`; zero where nothing is used."""
        parameters, statistics = self.entries(architecture)
        return Variables(parameter_table.draw(parameters, key), parameter_table.starts(statistics))

    def used(self, architecture: Code) -> PyTree:
        """Like the parameters: 1 for each entry that the network has, 0 for padding."""
        return parameter_table.used(self.entries(architecture)[0])

    def apply(
        self, architecture: Code, values: Variables, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        """Scores [B, classes] of images [B, H, W, C], and the statistics after this call."""
        p, s = values
        x, stem = call(self.stem, p["stem"], s["stem"], images, train=train)
        x, new = self._cells(architecture, values, x, train)
        scores, classifier = self._classify(p["classifier"], s["classifier"], x)
        return scores, {**new, "stem": stem, "classifier": classifier}

    def _cells(
        self, code: Code, values: Variables, x: jax.Array, train: bool
    ) -> tuple[Buffer, PyTree]:
        """The last cell's output for the stem's, and the cells' statistics."""
        p, s = values
        stacks, reductions = [], []
        before = Buffer(encoding.whole(STEM), jnp.stack(jnp.split(x, STEM, -1)))
        now, first = _first(self.spots[0], code, p["first"], s["first"], before, x, train)
        place = 1
        for k, (stack_p, stack_s) in enumerate(zip(p["stacks"], s["stacks"], strict=True)):
            if k:
                spot, both = self.spots[place], (p["reductions"][k - 1], s["reductions"][k - 1])
                reduced, new = _reduce(spot, code, *both, now, before, train)
                before, now, place = now, reduced, place + 1
                reductions.append(new)
            count = self.shape.cells_per_stack - (k == 0)
            run = self.spots[place : place + count]
            place += count
            new = {}
            if count:
                now, before, new = _stack(run, code, stack_p, stack_s, now, before, train)
            stacks.append(new)
        return now, {"first": first, "stacks": tuple(stacks), "reductions": tuple(reductions)}

    def _classify(
        self, parameters: PyTree, statistics: PyTree, last: Buffer
    ) -> tuple[jax.Array, PyTree]:
        linear = parameters["linear"]
        kernel = linear["kernel"].reshape(-1, self.shape.classes)
        members = last.concat.members()[:, None, None, None, None]
        x = jnp.concatenate(list(jnp.where(members, last.states, 0)), -1)
        whole = {"linear": {**linear, "kernel": kernel}}
        return call(self.classifier, whole, statistics, (x, x), train=False)

    def inherit(self, child: Code, parent: Code, fresh: Variables, trained: Variables) -> Variables:
        """`fresh` values of a child, but its parent's `trained` ones where slot and shape agree.

        That is where both have the entry, and in a slot the operations have equal shapes; a
        projection has the rows of the states that both concatenate.
        """
        mine, theirs = self.entries(child), self.entries(parent)
        same = [parameter_table.both(*pair) for pair in zip(mine, theirs, strict=True)]
        agreeing = [
            jax.tree.map(lambda keep, new, old: jnp.where(keep, old, new), *trees)
            for trees in zip(same, fresh, trained, strict=True)
        ]
        return Variables(*agreeing)


def _cell_entries(spot: Spot, code: Code) -> tuple[PyTree, PyTree]:
    own = code.reduction if spot.kind == "reduction" else code.normal
    found = {"body": spot.body.entries(own)}
    for name, reader, source in zip(
        ("enter", "match"), (spot.enter, spot.match), spot.sources, strict=True
    ):
        if reader is not None:
            found[name] = reader.entries(structure.concat_of(code, source))
    parameters, statistics = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    return parameters, statistics


def _first(
    spot: Spot, code: Code, p: PyTree, s: PyTree, stem: Buffer, x: jax.Array, train: bool
) -> tuple[Buffer, PyTree]:
    enter, enter_s = spot.enter(*stem[:1], p["enter"], s["enter"], stem.states, train=train)
    states, body = spot.body(code.normal, p["body"], s["body"], (enter, x), train=train)
    return Buffer(code.normal.concat, states), {"enter": enter_s, "body": body}


def _reduce(
    spot: Spot, code: Code, p: PyTree, s: PyTree, now: Buffer, before: Buffer, train: bool
) -> tuple[Buffer, PyTree]:
    assert spot.match is not None
    x, enter = spot.enter(now.concat, p["enter"], s["enter"], now.states, train=train)
    skip, match = spot.match(before.concat, p["match"], s["match"], before.states, train=train)
    states, body = spot.body(code.reduction, p["body"], s["body"], (x, skip), train=train)
    new = {"enter": enter, "match": match, "body": body}
    return Buffer(code.reduction.concat, states), new


def _stack(
    run: list[Spot], code: Code, p: PyTree, s: PyTree, now: Buffer, before: Buffer, train: bool
) -> tuple[Buffer, Buffer, PyTree]:
    """The outputs of the last cell and of the one before, and the statistics.

    Each cell makes state 1 of the next one, which it can as both read the same buffer.
    """
    start, match = run[0].match, run[-1].match
    enter, body, count = run[0].enter, run[0].body, len(run)
    assert start is not None and match is not None
    skip, start_s = start(before.concat, p["start"], s["start"], before.states, train=train)
    concats = [now.concat] + [code.normal.concat] * (count - 1)
    wanted = np.arange(count) < count - 1

    def cell(carry: tuple, xs: tuple) -> tuple[tuple, PyTree]:
        (states, _, skip), (concat, more, p, s) = carry, xs
        x, enter_s = enter(concat, p["enter"], s["enter"], states, train=train)
        new = {"enter": enter_s}
        made, new["body"] = body(code.normal, p["body"], s["body"], (x, skip), train=train)
        if count > 1:
            skip, new["match"] = match(
                concat, p["match"], s["match"], states, train=train, wanted=more
            )
        return (made, states, skip), new

    xs = (structure.stacked(concats), wanted, _for_each(p), _for_each(s))
    (last, previous, _), new = lax.scan(cell, (now.states, now.states, skip), xs)
    if count > 1:
        new["match"] = jax.tree.map(lambda a: a[:-1], new["match"])
    there = Buffer(code.normal.concat, last), Buffer(concats[-1], previous)
    return *there, {**new, "start": start_s}


def _for_each(stack: PyTree) -> PyTree:
    """What each cell of a stack gets; the last one makes no match."""
    names = [name for name in stack if name != "start"]
    each = {name: stack[name] for name in names}
    if "match" in each:
        filled = lambda a: jnp.concatenate([a, jnp.zeros_like(a[:1])])  # noqa: E731
        each["match"] = jax.tree.map(filled, each["match"])
    return each
