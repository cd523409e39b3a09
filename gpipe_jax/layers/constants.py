"""Take the constant arrays, such as a mask, out of a module, and put them back.

An array that a module keeps as a plain attribute is not a parameter. It is computed once, when the
module's template is made, and is a constant of the compiled program.
"""

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
    """Hold one attribute of a module, which is an array or a tree of arrays."""

    path: tuple  # of the part of the module
    name: str  # of the attribute
    value: PyTree  # as the module has it: of jax, or of numpy

    def __str__(self) -> str:
        return ".".join(map(str, (*self.path, self.name)))


def take(module: nnx.Module) -> list[Constant]:
    """Return the constant arrays of a module, and put None in their places.

    Raises UnfitModuleError if an attribute has arrays beside modules or variables.
    """
    found = [
        Constant(tuple(path), name, value)
        for path, part in nnx.iter_modules(module)
        for name, value in vars(part).items()
        if not name.startswith("_pytree__") and _is_constant(part, name, value)
    ]
    for constant in found:
        setattr(_part(module, constant.path), constant.name, None)
    return found


def _is_constant(module: Any, name: str, value: Any) -> bool:
    if _is_variable(value):
        return False
    leaves = jax.tree.leaves(value, is_leaf=_is_variable)
    has_arrays = any(map(_is_array, leaves))
    if has_arrays and any(map(_is_variable, leaves)):
        raise UnfitModuleError(
            f"{type(module).__name__} has arrays beside modules or variables in its attribute "
            f"`{name}`; give the arrays an attribute of their own"
        )
    return has_arrays


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _is_variable(value: Any) -> bool:
    return isinstance(value, nnx.Variable | nnx.Module)


def compute(build: Callable[[jax.Array], nnx.Module], name: str) -> list[Constant]:
    """Return the constants of the module that `build(key)` makes; the parameters are not computed.

    Raises UnfitModuleError, with the layer's name, if a constant depends on the key.
    """
    places: list[Constant] = []

    def values(seed: jax.Array) -> list[PyTree]:
        places[:] = take(build(jax.random.key(seed)))
        return [
            [_numbers(a) for a in jax.tree.leaves(constant.value) if _is_array(a)]
            for constant in places
        ]

    # Compiled ahead of its calls, it runs also while a program around it is traced.
    program = jax.jit(values).lower(jax.ShapeDtypeStruct((), np.uint32)).compile()
    first, second = (jax.tree.map(np.asarray, program(np.uint32(seed))) for seed in (0, 1))
    for constant, a, b in zip(places, first, second, strict=True):
        if not all(map(_same_bits, a, b)):
            raise UnfitModuleError(
                f"{name} draws its array `{constant}` at random, but a pipeline keeps only "
                f"parameters; make it an nnx.Param (with jax.lax.stop_gradient where it is used), "
                f"or draw it from a key of its own, as jax.random.key(0)"
            )
    return [_with_values(constant, arrays) for constant, arrays in zip(places, first, strict=True)]


def _numbers(a: Any) -> jax.Array:
    """Return an array of a strong type; of random keys, their numbers."""
    return jax.random.key_data(a) if _is_key(a) else strong(a)


def _is_key(a: Any) -> bool:
    return isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


class _OfJax(NamedTuple):
    """Hold an array that is JAX's in the module, for any device."""

    value: np.ndarray
    generator: Any = None  # of random keys


def _with_values(constant: Constant, arrays: Sequence[np.ndarray]) -> Constant:
    """Return a constant with its values in place of traced arrays."""
    rest = iter(arrays)

    def value(a: Any) -> Any:
        if not _is_array(a):
            return a
        known = next(rest)
        if not isinstance(a, jax.Array):
            return a
        return _OfJax(known, jax.random.key_impl(a) if _is_key(a) else None)

    return constant._replace(value=jax.tree.map(value, constant.value))


def put(module: nnx.Module, constants: Sequence[Constant]) -> list[PyTree]:
    """Set the attributes that `take` took, and return their values."""
    values = []
    for constant in constants:
        value = jax.tree.map(_restored, constant.value, is_leaf=lambda a: isinstance(a, _OfJax))
        part = _part(module, constant.path)
        setattr(part, constant.name, nnx.data(value))
        values.append(getattr(part, constant.name))
    return values


def _restored(a: Any) -> Any:
    if not isinstance(a, _OfJax):
        return a
    value = jnp.asarray(a.value)
    if a.generator is not None:
        return jax.random.wrap_key_data(value, impl=a.generator)
    return value


def check_unchanged(
    module: nnx.Module, constants: Sequence[Constant], values: Sequence[PyTree]
) -> None:
    """Raise ValueError if a call of the module has set one of its constants to another value."""
    for constant, value in zip(constants, values, strict=True):
        if getattr(_part(module, constant.path), constant.name) is not value:
            raise ValueError(
                f"a call changes the array `{constant}` of {type(module).__name__}, but a pipeline "
                f"carries only parameters and the statistics of nnx.BatchNorm from step to step; "
                f"leave the array as it is"
            )


def _part(module: Any, path: Sequence) -> Any:
    for key in path:
        by_name = isinstance(key, str) and not isinstance(module, Mapping)
        module = getattr(module, key) if by_name else module[key]
    return module
