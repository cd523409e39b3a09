"""How many floating-point operations a program does, by XLA's count, with every round of its loops.

XLA counts the body of a loop once: it does not look for how long the loop is.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

# Equations whose programs mean something in them only: kernels work on references, and the parts of
# a sharded program name the mesh's axes. XLA's count has of them what it sees.
_NOT_ENTERED = ("pallas_call", "shard_map")

# Names of platforms for which programs are lowered: a GPU that is not there is taken for NVIDIA's.
_ABSENT = {"cpu": "cpu", "gpu": "cuda"}  # the rest as "tpu"
_Platforms = tuple[str, ...] | None


def count_flops(program: Callable, specs: tuple, platform: str) -> float:
    """The floating-point operations of `program(*specs)` on such devices, which need not be there.

    A scan counts as many times as it is long, a conditional as its dearest branch. How long a while
    loop is nobody knows: it counts as one round, with a warning; so does a loop whose body cannot
    be looked at by itself, as it writes to references of the program around it.
    """
    here = platform == jax.default_backend()
    return sum(_counts(program, specs, None if here else (_ABSENT.get(platform, "tpu"),)))


def _counts(program: Callable, specs: tuple, platforms: _Platforms) -> tuple[float, float]:
    """By XLA's count, and what that leaves out."""
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
        # XLA sees one round of `unroll` steps, and the steps that are left over behind the loop.
        unseen = max(params["length"] // params["unroll"] - 1, 0) * params["unroll"]
        if not unseen:
            return params["length"] * _left_out(params["jaxpr"].jaxpr, platforms)
        once, more = _of_jaxpr(params["jaxpr"], platforms)
        return unseen * once + params["length"] * more
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
    except Exception:  # whatever JAX raises: a layer that runs must not fail for being counted
        _warn("whose body cannot be looked at by itself")
        return 0.0, _left_out(jaxpr.jaxpr, platforms)


def _is_float(variable: Any) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


def _warn(loop: str) -> None:
    warnings.warn(
        f"the cost of a layer counts one round of a loop {loop}; "
        "to balance by it use the cost 'time', or give the costs",
        stacklevel=3,
    )


def _inside(equation: Any) -> Iterator[Jaxpr]:
    """The programs that an equation is made of: a jit's, a remat's, a custom derivative's."""
    for value in jax.tree.leaves(list(equation.params.values())):
        value = value.jaxpr if isinstance(value, ClosedJaxpr) else value
        if isinstance(value, Jaxpr):
            yield value
