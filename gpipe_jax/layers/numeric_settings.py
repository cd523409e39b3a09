"""Cache what is traced or computed by JAX's settings too: they change types and numbers.

`jax.jit` traces anew when such a setting changes. A cache of our own must do the same.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

# What changes the types, the random numbers or the rounding of a program. A version of JAX may lack
# some of them.
_NAMES = (
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_default_dtype_bits",
    "jax_numpy_dtype_promotion",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_random_seed_offset",
    "jax_threefry_partitionable",
    "jax_high_dynamic_range_gumbel",
    "jax_softmax_custom_jvp",
    "jax_optimization_level",
)


def numeric_settings() -> tuple:
    """Return this thread's values of the settings that change what a program computes."""
    return tuple(getattr(jax.config, name, None) for name in _NAMES)


def cached_by_settings(maxsize: int) -> Callable[[Callable], Callable]:
    """Return a decorator like `functools.lru_cache`, whose keys have the numeric settings too.

    Args:
        maxsize: The number of results that are kept; the least recently used go.

    Returns:
        A decorator of functions of hashable positional arguments. The decorated function has
        `cache_clear()`.

    Example:
        >>> @cached_by_settings(maxsize=8)
        ... def default_float() -> str:
        ...     return str(jax.numpy.zeros(()).dtype)
        >>> default_float()
        'float32'
        >>> with jax.enable_x64(True):
        ...     default_float()
        'float64'
    """

    def decorate(function: Callable) -> Callable:
        @functools.lru_cache(maxsize)
        def cached(settings: tuple, *arguments: Any) -> Any:
            del settings
            return function(*arguments)

        @functools.wraps(function)
        def look_up(*arguments: Any) -> Any:
            return cached(numeric_settings(), *arguments)

        look_up.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
        return look_up

    return decorate
