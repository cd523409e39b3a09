"""Take the constant arrays, such as a table, out of a module, and put them back.

A constant is an array that a module keeps as a plain attribute, or in an `nnx.Variable` that is no
parameter, statistic or random stream. Constants of JAX pass through the compiled program as data.
Arrays of NumPy stay as they are, because the module may use their numbers while it is traced.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpipe_jax.utils.trees import PyTree, strong


class UnfitModuleError(ValueError):
    """Report a layer that holds what a pipeline cannot carry; the message begins with the layer."""


class Constant(NamedTuple):
    """Hold the place of one attribute, or variable, that has arrays, and what else it has."""

    path: tuple  # in the module
    kind: type[nnx.Variable] | None  # None for a plain attribute
    value: PyTree  # the value, in which a `Gap` may stand for each array of JAX

    def __str__(self) -> str:
        return ".".join(map(str, self.path))


class Gap(NamedTuple):
    """Stand for an array of JAX in the value of a constant."""

    name: str  # of the array, among the constants of the module
    generator: Any = None  # of random keys, which are stored as their numbers


class Constants(NamedTuple):
    """Hold the constants of a module: where they belong, and their arrays by name."""

    places: Sequence[Constant] = ()  # with gaps
    arrays: Mapping[str, Any] = {}

    @property
    def digest(self) -> str:
        """Return a text that is equal for equal constants."""
        hashed = hashlib.sha256()
        leaves = [leaf for place in self.places for leaf in jax.tree.leaves(place)]
        for leaf in [*leaves, *self.arrays.values()]:
            is_numpy = isinstance(leaf, np.ndarray)
            hashed.update(leaf.tobytes() if is_numpy else repr(leaf).encode())
            hashed.update(f"{leaf.dtype}{leaf.shape}".encode() if is_numpy else b"")
        return hashed.hexdigest()


def take(module: nnx.Module) -> list[Constant]:
    """Return the attributes of a module that hold arrays, and put None in their places.

    Raises UnfitModuleError if an attribute has arrays beside modules or variables.
    """
    found = [
        Constant((*path, name), None, value)
        for path, part in nnx.iter_modules(module)
        for name, value in vars(part).items()
        if not name.startswith("_pytree__") and _is_constant(part, name, value)
    ]
    for constant in found:
        _set(module, constant.path, None)
    return found


def of_variables(state: nnx.State) -> list[Constant]:
    """Return the variables of a state as constants."""
    return [Constant(path, type(v), v.get_value()) for path, v in nnx.to_flat_state(state)]


def _is_constant(module: Any, name: str, value: Any) -> bool:
    if _is_variable(value):
        return False
    leaves = jax.tree.leaves(value, is_leaf=_is_variable)
    has_arrays = any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    if has_arrays and any(map(_is_variable, leaves)):
        raise UnfitModuleError(
            f"{type(module).__name__} has arrays beside modules or variables in its attribute "
            f"`{name}`; give the arrays an attribute of their own"
        )
    return has_arrays


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable | nnx.Module)


def separate(constants: Sequence[Constant]) -> Constants:
    """Separate the arrays of JAX from the rest of the constants."""
    arrays: dict[str, jax.Array] = {}

    def gap(constant: Constant, i: int, a: Any) -> Any:
        if constant.kind is None and not isinstance(a, jax.Array):
            return a
        name = f"{constant}.{i}" if i else str(constant)
        arrays[name] = _numbers(a)
        return Gap(name, jax.random.key_impl(a) if _is_key(a) else None)

    places = []
    for constant in constants:
        leaves, structure = jax.tree.flatten(constant.value)
        gaps = [gap(constant, i, a) for i, a in enumerate(leaves)]
        places.append(constant._replace(value=structure.unflatten(gaps)))
    return Constants(places, arrays)


def of_module(module: nnx.Module, *kinds: Any) -> Constants:
    """Return all constants of a module, from which the attributes are taken.

    `kinds` are the types of variables that are no constants.
    """
    attributes = take(module)
    *_, rest = nnx.split(module, *kinds, ...)
    return separate([*attributes, *of_variables(rest)])


def compute(build: Callable[[jax.Array], Constants], name: str) -> Constants:
    """Return the constants that `build(key)` returns when traced; nothing else is computed.

    Raises UnfitModuleError, with the layer's name, if a constant depends on the key.
    """
    places: list[Constant] = []

    def values(seed: jax.Array) -> dict[str, jax.Array]:
        constants = build(jax.random.key(seed))
        places[:] = constants.places
        return dict(constants.arrays)

    # Compiled ahead of its calls, it runs also while a program around it is traced.
    program = jax.jit(values).lower(jax.ShapeDtypeStruct((), np.uint32)).compile()
    first, second = (jax.tree.map(np.asarray, program(np.uint32(seed))) for seed in (0, 1))
    for array in first:
        if first[array].tobytes() != second[array].tobytes():
            raise UnfitModuleError(
                f"{name} draws its array `{array}` at random, but the seed of a pipeline draws "
                f"only parameters; make it an nnx.Param (with jax.lax.stop_gradient where it is "
                f"used), or draw it from a key of its own, as jax.random.key(0)"
            )
    return Constants(places, first)


def _numbers(a: Any) -> jax.Array:
    """Return an array of a strong type; of random keys, their numbers."""
    return jax.random.key_data(a) if _is_key(a) else strong(a)


def _is_key(a: Any) -> bool:
    return isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key)


def fill(places: Sequence[Constant], arrays: Mapping[str, Any]) -> list[Constant]:
    """Return the constants with their arrays in the gaps."""

    def restored(a: Any) -> Any:
        if not isinstance(a, Gap):
            return a
        value = jnp.asarray(arrays[a.name])
        if a.generator is not None:
            return jax.random.wrap_key_data(value, impl=a.generator)
        return value

    def is_gap(a: Any) -> bool:
        return isinstance(a, Gap)

    return [c._replace(value=jax.tree.map(restored, c.value, is_leaf=is_gap)) for c in places]


def variables(constants: Sequence[Constant]) -> PyTree:
    """Return the values of the variables among the constants, in the form of a pure dict."""
    flat = [(c.path, c.kind(c.value)) for c in constants if c.kind is not None]
    return nnx.to_pure_dict(nnx.from_flat_state(flat))


def put(module: nnx.Module, constants: Sequence[Constant]) -> list[Constant]:
    """Set the attributes that `take` took, and return the constants as the module has them."""
    for constant in constants:
        if constant.kind is None:
            _set(module, constant.path, nnx.data(constant.value))
    return [c._replace(value=_value(module, c)) for c in constants]


def check_unchanged(module: nnx.Module, constants: Sequence[Constant]) -> None:
    """Raise ValueError if a call of the module has set one of its constants to another value."""
    for constant in constants:
        if _value(module, constant) is not constant.value:
            raise ValueError(
                f"a call changes the array `{constant}` of {type(module).__name__}, but a pipeline "
                f"carries only parameters and the statistics of nnx.BatchNorm from step to step; "
                f"leave the array as it is"
            )


def _value(module: nnx.Module, constant: Constant) -> Any:
    value = part(module, constant.path)
    return value.get_value() if constant.kind is not None else value


def _set(module: nnx.Module, path: tuple, value: Any) -> None:
    setattr(part(module, path[:-1]), path[-1], value)


def part(module: Any, path: Sequence) -> Any:
    """Return what a module has at a path of attributes and keys."""
    for key in path:
        by_name = isinstance(key, str) and not isinstance(module, Mapping)
        module = getattr(module, key) if by_name else module[key]
    return module
