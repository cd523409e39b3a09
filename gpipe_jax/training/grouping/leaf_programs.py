"""Find which parameters an optimizer treats alike, from its traced program.

Each parameter has a program: how its update and its new state come from its own gradient, state and
value, from constants, and from numbers that all parameters share (such as a global norm). Two
parameters are treated alike if their programs are equal but for shapes. So it does not matter how a
mask is written: as a tree, by name or by rank.
"""

import collections
import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.extend import core

from gpipe_jax.utils.trees import PyTree

_SHARED = -1  # owner of a number that comes from several parameters

# Parameters of operations that follow from shapes.
_OF_SHAPES = frozenset(
    [
        "shape",
        "broadcast_dimensions",
        "sharding",
        "out_sharding",
        "axes",
        "dimensions",
        "new_sizes",
        "permutation",
    ]
)
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # parameters that hold the program of a call


class StateLeaf(NamedTuple):
    """Say what an array of the optimizer's state belongs to."""

    tree: str  # the tree in the form of the parameters, as "0.mu"; "" if it belongs to none
    leaf: int  # the parameter; the number of the array if it belongs to none


class Programs(NamedTuple):
    """Hold the program of each parameter, and what the state's arrays belong to."""

    keys: tuple[Hashable, ...]  # equal for parameters that are treated alike
    constant: tuple[bool, ...]  # whether the update does not depend on the gradient
    state: tuple[StateLeaf, ...]
    shapes: PyTree  # of the state


class _Value(NamedTuple):
    """Describe a value of the traced program."""

    owner: int | None  # the parameter that it comes from, `_SHARED`, or None: from constants only
    code: int  # equal for values that are computed alike
    is_scalar: bool


class Codes(collections.defaultdict):
    """Number whatever is looked up: equal keys have equal numbers."""

    def __init__(self) -> None:
        super().__init__(itertools.count().__next__)


class UnlikeParametersError(ValueError):
    """Report that a state has arrays of other shapes than the parameters."""


def trace(
    tx: optax.GradientTransformationExtraArgs, gradients: PyTree, params: PyTree, codes: Codes
) -> Programs:
    """Trace one update, and return the programs of the parameters; nothing is computed.

    Args:
        tx: An optax transformation.
        gradients: Shapes of the gradients. There must be no scalars, as a scalar does not show
            whether it is a parameter or the sum of one; use shape [1] instead.
        params: Shapes of the parameters, likewise.
        codes: The same object for all programs that are compared.

    Raises:
        UnlikeParametersError: The state has arrays of other shapes than the parameters.
    """
    leaves = jax.tree.leaves(params)
    init, shapes = jax.make_jaxpr(tx.init, return_shape=True)(gradients)
    state = state_leaves(shapes, params)

    def update(gradients: PyTree, params: PyTree, decaying: PyTree, state: PyTree) -> tuple:
        return tx.update(gradients, state, params, decaying=decaying)

    updated = jax.make_jaxpr(update)(gradients, params, params, shapes)
    reader, count = _Reader(codes), len(leaves)
    inputs = [
        reader.input(name, i) for name in ("gradient", "param", "decaying") for i in range(count)
    ]
    initial = reader.closed(init, inputs[:count])
    inputs += [reader.input(a.tree, a.leaf if a.tree else None, a.leaf) for a in state]
    outputs = reader.closed(updated, inputs)
    updates, after = outputs[:count], outputs[count:]
    keys: list[list] = [[reader.code_for(i, value)] for i, value in enumerate(updates)]
    arrays = zip(state, initial, after, jax.tree.leaves(shapes), strict=True)
    for (tree, i), first, new, shape in arrays:
        if tree:
            both = (reader.code_for(i, value) for value in (first, new))
            keys[i].append((tree, *both, str(shape.dtype)))
    constant = tuple(value.owner is None for value in updates)
    return Programs(tuple(map(tuple, keys)), constant, state, shapes)


def state_leaves(state: PyTree, params: PyTree) -> tuple[StateLeaf, ...]:
    """Return what each array of an optimizer's state belongs to.

    Within a state, the path of an array that belongs to a parameter ends with the parameter's path.

    Raises:
        UnlikeParametersError: An array of the state has not the shape of its parameter.
    """
    named = jax.tree.leaves_with_path(params)
    index = {path: i for i, (path, _) in enumerate(named)}
    lengths = sorted({len(path) for path in index}, reverse=True)
    belongs, others = [], itertools.count()
    for path, a in jax.tree.leaves_with_path(state):
        ends = (path[-n:] for n in lengths if n < len(path) or not n)
        i = next((index[end] for end in ends if end in index), None)
        if i is not None and a.shape == named[i][1].shape:
            tree = jax.tree_util.keystr(path[: len(path) - len(named[i][0])])
            belongs.append(StateLeaf(tree, i))
        elif i is None or a.shape == ():
            belongs.append(StateLeaf("", next(others)))
        else:
            raise UnlikeParametersError(
                f"its state {jax.tree_util.keystr(path)} has the shape {a.shape}, and its "
                f"parameter {named[i][1].shape}"
            )
    return tuple(belongs)


class _Reader:
    """Read traced programs: give equal codes to values that are computed alike."""

    def __init__(self, codes: Codes) -> None:
        self._codes = codes
        self._shared: dict[tuple, int] = {}  # numbers of shared values, in the order of their use
        self._unique = itertools.count()

    def input(self, name: str, owner: int | None, number: int = 0) -> _Value:
        """Return the value of an input that has the same name for all owners."""
        number = number if owner is None else 0
        return _Value(owner, self._codes["input", name, number], is_scalar=owner is None)

    def code_for(self, owner: int, value: _Value) -> int:
        """Return the code of a value, as it looks from a parameter's program."""
        if value.owner in (None, owner):
            return value.code
        number = self._shared.setdefault((value.owner, value.code), len(self._shared))
        return self._codes["shared", number]

    def closed(self, jaxpr: Any, inputs: Sequence[_Value]) -> list[_Value]:
        """Return the outputs of a program for these inputs."""
        constants = [self._constant(a) for a in jaxpr.consts]
        return self._read(jaxpr.jaxpr, [*constants, *inputs])

    def _constant(self, a: Any) -> _Value:
        a = np.asarray(a)
        code = self._codes["constant", a.shape, str(a.dtype), a.tobytes()]
        return _Value(None, code, a.shape == ())

    def _read(self, jaxpr: Any, inputs: Sequence[_Value]) -> list[_Value]:
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), inputs, strict=True))

        def value(variable: Any) -> _Value:
            is_literal = isinstance(variable, core.Literal)
            return self._constant(variable.val) if is_literal else values[variable]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, [value(v) for v in equation.invars])
            values.update(zip(equation.outvars, outputs, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[_Value]) -> list[_Value]:
        params = equation.params
        called: Any = next((params[name] for name in _CALLS if name in params), None)
        if called is not None and equation.primitive.name not in ("while", "scan"):
            is_closed = isinstance(called, core.ClosedJaxpr)
            closed = called if is_closed else core.ClosedJaxpr(called, ())
            return self.closed(closed, inputs)
        if "branches" in params:
            chosen, *rest = inputs
            branches = [self.closed(branch, rest) for branch in params["branches"]]
            by_output = zip(equation.outvars, *branches, strict=True)
            return [self._output("cond", 0, v, [chosen, *of]) for v, *of in by_output]
        key = equation.primitive.name, self._settings(params)
        return [self._output(key, n, v, inputs) for n, v in enumerate(equation.outvars)]

    def _settings(self, params: dict) -> Hashable:
        """Return the parameters of an operation but for shapes."""
        settings = {name: a for name, a in params.items() if name not in _OF_SHAPES}
        if any(isinstance(a, (core.Jaxpr, core.ClosedJaxpr)) for a in settings.values()):
            return next(self._unique)  # a loop: equal to no other
        return tuple(sorted((name, str(a)) for name, a in settings.items()))

    def _output(self, key: Hashable, n: int, variable: Any, inputs: list[_Value]) -> _Value:
        is_scalar = variable.aval.shape == ()
        owners = {value.owner for value in inputs} - {None}
        arrays = {value.owner for value in inputs if not value.is_scalar} - {None, _SHARED}
        if len(owners) <= 1:
            owner = next(iter(owners), None)
        elif is_scalar or len(arrays) != 1:
            return _Value(_SHARED, self._codes["mixed", next(self._unique)], is_scalar)
        else:
            owner = next(iter(arrays))
        codes = tuple(v.code if owner is None else self.code_for(owner, v) for v in inputs)
        return _Value(owner, self._codes[key, n, codes], is_scalar)
