"""Count the floating-point operations of a program, by XLA's count times the rounds of its loops.

XLA counts the body of a loop once, whatever the length of the loop.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

# Equations whose inner programs cannot run alone: kernels work on references, and sharded programs
# use the names of mesh axes. For them, XLA's count is used as it is.
_NOT_ENTERED = ("pallas_call", "shard_map")

# Platforms to lower programs for if this machine has another one; a GPU counts as NVIDIA's, and
# every other platform as a TPU.
_ABSENT = {"cpu": "cpu", "gpu": "cuda"}
_Platforms = tuple[str, ...] | None


def count_flops(program: Callable, specs: tuple, platform: str) -> float:
    """Count the floating-point operations of `program(*specs)` on a platform, present or not.

    A scan counts as often as it is long, and a conditional as its most expensive branch. The length
    of a while loop is unknown: it counts as one round, with a warning. So does a loop whose body
    cannot be lowered alone, because it writes to references of the program around it.
    """
    is_present = platform == jax.default_backend()
    return sum(_counts(program, specs, None if is_present else (_ABSENT.get(platform, "tpu"),)))


def _counts(program: Callable, specs: tuple, platforms: _Platforms) -> tuple[float, float]:
    """Return XLA's count, and the operations that it leaves out."""
    traced = jax.jit(program).trace(*specs)
    analysis = traced.lower(lowering_platforms=platforms).cost_analysis() or {}
    return float(analysis.get("flops", 0.0)), _left_out(traced.jaxpr.jaxpr, platforms)


def _left_out(jaxpr: Jaxpr, platforms: _Platforms) -> float:
    return sum(_left_out_of(equation, platforms) for equation in jaxpr.eqns)


def _left_out_of(equation: Any, platforms: _Platforms) -> float:
    name, params = equation.primitive.name, equation.params
    if name in _NOT_ENTERED:
        return 0.0
    if name == "scan":
        # XLA counts one round of `unroll` steps, and the steps that remain after the loop.
        uncounted = max(params["length"] // params["unroll"] - 1, 0) * params["unroll"]
        if not uncounted:
            return params["length"] * _left_out(params["jaxpr"].jaxpr, platforms)
        once, more = _of_jaxpr(params["jaxpr"], platforms)
        return uncounted * once + params["length"] * more
    if name == "cond" and any(_left_out(branch.jaxpr, platforms) for branch in params["branches"]):
        branches = [_of_jaxpr(branch, platforms) for branch in params["branches"]]
        return max(map(sum, branches)) - max(once for once, _ in branches)
    if name == "while" and any(_is_float(a) for a in equation.outvars):
        _warn("of unknown length (lax.while_loop)")
    return sum(_left_out(inner, platforms) for inner in _inside(equation))


def _of_jaxpr(jaxpr: ClosedJaxpr, platforms: _Platforms) -> tuple[float, float]:
    try:
        specs = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.in_avals)
        return _counts(jaxpr_as_fun(jaxpr), specs, platforms)
    except Exception:  # whatever JAX raises: counting must not stop a layer that runs
        _warn("whose body cannot be lowered alone")
        return 0.0, _left_out(jaxpr.jaxpr, platforms)


def _is_float(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


def _warn(loop: str) -> None:
    warnings.warn(
        f"the cost of a layer counts one round of a loop {loop}; "
        "to balance by its true cost, use the cost 'time', or give the costs",
        stacklevel=3,
    )


def _inside(equation: Any) -> Iterator[Jaxpr]:
    """Yield the inner programs of an equation: of a jit, a remat, a custom derivative."""
    for value in jax.tree.leaves(list(equation.params.values())):
        value = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        if isinstance(value, Jaxpr):
            yield value
