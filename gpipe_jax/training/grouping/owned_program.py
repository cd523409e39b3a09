"""Run an optimizer's traced program for some of the parameters only.

Each value of the program comes from one parameter, its owner, or from none. Scalars may come from
several: a global norm is made of a sum for each parameter. So a scalar that comes from an array is
shared: all devices exchange it, and from then on it has no owner. Shared scalars may depend on each
other, so they are exchanged level by level:

    level 0   the squares of each gradient are summed: they make the global norm
    level 1   the norm of each clipped update: it makes LAMB's trust ratio

A program that mixes parameters in any other way is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core


class MixedError(ValueError):
    """Report that a program mixes the elements of several parameters."""


class _Owned(NamedTuple):
    """Hold a value, who owns it, and how many exchanges it waits for."""

    array: Any  # None if it is not computed here
    owner: int | None
    level: int


class Shared(NamedTuple):
    """Describe a scalar that the devices exchange."""

    owner: int
    level: int
    dtype: Any


class OwnedProgram:
    """Hold a traced program whose inputs and outputs have owners.

    Args:
        closed: The program.
        owners: The owner of each input; None if it has none.

    Attributes:
        shared: The scalars that are exchanged, in their order.
        shares_in_branches: Whether there are others, in conditionals; these cannot be exchanged.
        levels: How many exchanges there are.
        owners: The owner of each output.

    Raises:
        MixedError: The program mixes parameters in other ways than by scalars.
    """

    def __init__(self, closed: Any, owners: Sequence[int | None]) -> None:
        self._closed, self._inputs = closed, owners
        walk = _Walk(None, {})
        outputs = walk.closed(closed, [_Owned(None, owner, 0) for owner in owners])
        self.shared, self.shares_in_branches = walk.shared, walk.shares_in_branches
        self.levels = 1 + max((scalar.level for scalar in self.shared), default=-1)
        self.owners = [value.owner for value in outputs]

    def scalars(
        self, level: int, own: set[int], known: Mapping[int, jax.Array], inputs: Sequence[Any]
    ) -> dict[int, jax.Array]:
        """Return the shared scalars of a level by number; zero for those of other parameters.

        Args:
            level: The level.
            own: The parameters whose inputs are given.
            known: The scalars of lower levels, by number.
            inputs: The inputs; those of other parameters are ignored.
        """
        walk = self._walk(own, known, inputs)[0]
        return {
            n: walk.found[n] if scalar.owner in own else jnp.zeros((), scalar.dtype)
            for n, scalar in enumerate(self.shared)
            if scalar.level == level
        }

    def outputs(
        self, own: set[int], known: Mapping[int, jax.Array], inputs: Sequence[Any]
    ) -> list[Any]:
        """Return the outputs; None for those of other parameters."""
        return [value.array for value in self._walk(own, known, inputs)[1]]

    def _walk(
        self, own: set[int], known: Mapping[int, jax.Array], inputs: Sequence[Any]
    ) -> tuple["_Walk", list[_Owned]]:
        walk = _Walk(own, known)
        values = [
            _Owned(array if owner is None or owner in own else None, owner, 0)
            for array, owner in zip(inputs, self._inputs, strict=True)
        ]
        return walk, walk.closed(self._closed, values)


class _Walk:
    """Go through a program once; compute what belongs to the parameters in `own`.

    With `own` None nothing is computed.
    """

    def __init__(self, own: set[int] | None, known: Mapping[int, jax.Array]) -> None:
        self._own, self._known = own, known
        self.shared: list[Shared] = []
        self.shares_in_branches = False
        self.found: dict[int, jax.Array] = {}

    def closed(self, closed: Any, inputs: Sequence[_Owned]) -> list[_Owned]:
        """Return the outputs of a program."""
        jaxpr = closed.jaxpr
        constants = [_Owned(a, None, 0) for a in closed.consts]
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

        def value(variable: Any) -> _Owned:
            is_literal = isinstance(variable, core.Literal)
            return _Owned(variable.val, None, 0) if is_literal else values[variable]

        for equation in jaxpr.eqns:
            alone = jaxpr.replace(constvars=[], invars=[], outvars=[], eqns=[equation])
            outputs = self._equation(alone, [value(v) for v in equation.invars])
            values.update(zip(equation.outvars, outputs, strict=True))
        return [value(v) for v in jaxpr.outvars]

    def _equation(self, alone: Any, inputs: list[_Owned]) -> list[_Owned]:
        """Return the results of an equation, which stands alone in a program."""
        [equation] = alone.eqns
        if (called := _called(equation)) is not None:
            return self.closed(called, inputs)
        owners = self._owners(equation, inputs)
        level = max((value.level for value in inputs), default=0)
        arrays = self._arrays(alone, inputs, owners)
        return [
            self._value(array, owner, level, variable.aval)
            for array, owner, variable in zip(arrays, owners, equation.outvars, strict=True)
        ]

    def _owners(self, equation: Any, inputs: Sequence[_Owned]) -> list[int | None]:
        """Return the owner of each output."""
        found = {value.owner for value in inputs} - {None}
        if len(found) <= 1:
            return [next(iter(found), None)] * len(equation.outvars)
        if equation.primitive.name == "cond":
            return self._owners_of_branches(equation.params["branches"], inputs)
        raise MixedError(f"`{equation.primitive.name}` takes elements of several parameters")

    def _owners_of_branches(
        self, branches: Sequence[Any], inputs: Sequence[_Owned]
    ) -> list[int | None]:
        """Return the owner of each output of a conditional, whose branches share no scalars."""
        index, *operands = inputs
        found: list[set[int]] = [set() for _ in branches[0].jaxpr.outvars]
        for branch in branches:
            walk = _Walk(None, {})
            for own, value in zip(found, walk.closed(branch, operands), strict=True):
                own.update(o for o in (value.owner, index.owner) if o is not None)
            if any(len(own) > 1 for own in found):
                raise MixedError("a conditional mixes elements of several parameters")
            self.shares_in_branches |= bool(walk.shared) or walk.shares_in_branches
        return [next(iter(own), None) for own in found]

    def _arrays(
        self, alone: Any, inputs: Sequence[_Owned], owners: Sequence[int | None]
    ) -> list[Any]:
        """Return the results, or None for each if they are not computed here."""
        if self._own is None or not any(o is None or o in self._own for o in owners):
            return [None] * len(owners)
        [equation] = alone.eqns
        given = {
            variable: jnp.zeros(variable.aval.shape, variable.aval.dtype)
            if value.array is None
            else value.array
            for variable, value in zip(equation.invars, inputs, strict=True)
            if not isinstance(variable, core.Literal)
        }
        jaxpr = alone.replace(invars=list(given), outvars=equation.outvars)
        return core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*given.values())

    def _value(self, array: Any, owner: int | None, level: int, aval: Any) -> _Owned:
        """Return a result; share a scalar, and take what was exchanged, if it was."""
        if owner is None or aval.shape:
            return _Owned(array, owner, level)
        n = len(self.shared)
        self.shared.append(Shared(owner, level, aval.dtype))
        self.found[n] = array
        if array is None and self._own is not None:
            array = jnp.zeros((), aval.dtype)  # of another device, and not yet exchanged
        return _Owned(self._known.get(n, array), None, level + 1)


def _called(equation: Any) -> Any:
    """Return the program that an equation calls once with its own inputs, or None."""
    if equation.primitive.name in ("scan", "while", "cond"):
        return None
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    called: Any = next((equation.params[n] for n in names if n in equation.params), None)
    if called is None or isinstance(called, core.ClosedJaxpr):
        return called
    return core.ClosedJaxpr(called, ())
