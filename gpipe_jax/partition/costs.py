"""Estimate the cost of each layer: time, and bytes of parameters, working set and output.

The partition is computed from these costs. Times are in seconds, either measured or from the number
of floating-point operations at a nominal rate. Only their ratios matter.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from gpipe_jax.distributed import processes
from gpipe_jax.distributed.mesh import DATA
from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.layer import Context
from gpipe_jax.layers.shape_inference import Fixed, LayerShape, as_replica
from gpipe_jax.losses.weighting import weighted_sums
from gpipe_jax.partition.flops import count_flops
from gpipe_jax.utils.trees import (
    PyTree,
    float_leaves,
    merge,
    signature,
    strong,
    tree_bytes,
    vjp,
)

# Nominal (floating-point operations, bytes over the link to the next stage) per second, to weigh
# compute against transfer. They are orders of magnitude: of a matrix unit and one interconnect link
# of a current device, and of a core and its memory for a simulated CPU mesh.
NOMINAL_RATES = {"cpu": (2e10, 5e9), "gpu": (1e14, 5e10), "tpu": (1e14, 5e10)}


class LayerCost(NamedTuple):
    """Hold the cost of one layer for one micro-batch on one replica."""

    compute_s: float  # forward (recomputed) and backward: the time of an entry with a backward
    parameter_bytes: int  # trained ones and running statistics
    working_bytes: int  # stored between the layer's forward and its backward
    boundary_bytes: int  # the boundary after it: its output, and skips that pass it
    flops: float | None = None  # of `compute_s`; None if the times are measured or given
    fixed_bytes: int = 0  # frozen parameters and constants


def measure(
    shapes: Sequence[LayerShape],
    kind: str | Sequence[float],
    platform: str,
    *,
    shared: bool = False,
) -> list[LayerCost]:
    """Return the cost of each layer; equal layers are measured once.

    Args:
        shapes: The layers.
        kind: "flops" (see `count_flops`), "time" (the median of five runs on this machine), or the
            costs themselves, one number for each layer in any unit.
        platform: The platform to count operations for.
        shared: Whether several processes cut the same network. All of them then use the times of
            the first process, so all must call this function.
    """
    flops: Sequence[float | None] = [None] * len(shapes)
    if not isinstance(kind, str):
        if len(kind) != len(shapes):
            raise ArgumentError(
                "cost", f"`cost` has {len(kind)} numbers for {len(shapes)} layers; give one each"
            )
        times = [float(c) for c in kind]
    elif kind == "flops":
        rate = NOMINAL_RATES.get(platform, NOMINAL_RATES["tpu"])[0]
        flops = _each_distinct(shapes, lambda s: count_flops(*_training_program(s), platform))
        times = [count / rate for count in flops]
    elif kind == "time":
        times = _each_distinct(shapes, lambda s: _measured_time(*_training_program(s)))
        if shared:  # processes measure different times, and all must cut in the same way
            times = _of_first_process(times)
    else:
        raise ArgumentError(
            "cost", f"`cost` must be 'flops', 'time' or one number a layer, got {kind!r}"
        )
    working = _each_distinct(shapes, _working_bytes)
    behind = [*(shape.boundary for shape in shapes[1:]), shapes[-1].output]
    return [
        LayerCost(
            t, tree_bytes((s.params, s.stats)), w, tree_bytes(after), count, tree_bytes(s.fixed)
        )
        for t, w, s, after, count in zip(times, working, shapes, behind, flops, strict=True)
    ]


def _of_first_process(times: Sequence[float]) -> list[float]:
    """Return the first process's times, with all their bits; every process must call this.

    Processes exchange int32 numbers, so each float64 travels as two of them.
    """
    words = np.asarray(times, np.float64).view(np.int32).tolist()
    words = processes.broadcast_from_first(words)
    return np.asarray(words, np.int32).view(np.float64).tolist()


def describe(kind: str | Sequence[float], platform: str) -> str:
    """Say what costs of this kind are, as in "operations, counted for cpu"."""
    if not isinstance(kind, str):
        return "the numbers given"
    return f"operations, counted for {platform}" if kind == "flops" else "measured times"


def transfer_s(costs: Sequence[LayerCost], platform: str) -> list[float]:
    """Return the seconds to send each layer's boundary, and to get its gradient back."""
    rate = NOMINAL_RATES.get(platform, NOMINAL_RATES["tpu"])[1]
    return [2 * cost.boundary_bytes / rate for cost in costs]


def _each_distinct(shapes: Sequence[LayerShape], function: Callable) -> list:
    known: dict = {}
    names = [
        (s.layer, signature((s.input, s.extras)), signature(s.params), s.frozen_ties)
        for s in shapes
    ]
    for name, shape in zip(names, shapes, strict=True):
        if name not in known:
            known[name] = function(shape)
    return [known[name] for name in names]


def _training_program(shape: LayerShape) -> tuple[Callable, tuple]:
    """Return the layer's forward and backward as a program, and the shapes to call it with."""

    def program(*arguments: Any) -> PyTree:
        y, pull = _vjp(shape, *arguments)
        return y, pull([jnp.ones_like(a) for a in y])

    return as_replica(program), _arguments(shape)


def _arguments(shape: LayerShape) -> tuple:
    """Return the shapes of what is trained, what is not, statistics, input, extras and seed.

    Both have the parameters that the layer borrows.
    """
    trained, frozen = {}, {}
    for name, borrowed in shape.borrowed.items():
        (frozen if name in shape.frozen_ties else trained)[name] = borrowed
    params = skips_and_ties.fill(shape.layer, shape.params, trained)
    fixed_params = skips_and_ties.fill(shape.layer, shape.fixed.params, frozen)
    fixed = shape.fixed._replace(params=fixed_params)
    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    return params, fixed, shape.stats, shape.input, shape.extras, seed


def _vjp(
    shape: LayerShape,
    params: PyTree,
    fixed: Fixed,
    stats: PyTree,
    x: PyTree,
    extras: dict[str, PyTree],
    seed: jax.Array,
) -> tuple[list, Callable]:
    """Differentiate in the trained parameters and the floating-point inputs."""

    def run(params: PyTree, x: PyTree) -> tuple[PyTree, None]:
        progress = jnp.asarray(1.0, float)  # typed, as in a step
        key = jax.random.key(seed)
        context = Context(key, True, progress, fixed.constants, extras)
        whole = merge(params, fixed.params)
        return strong(shape.layer.apply(whole, stats, x, context)[0]), None

    y, pull, _ = vjp(run, params, x)
    return float_leaves(y), pull


def _measured_time(program: Callable, specs: tuple) -> float:
    device = jax.local_devices()[0]
    arrays = jax.device_put(jax.tree.map(lambda a: np.ones(a.shape, a.dtype), specs), device)
    compiled = jax.jit(program)
    jax.block_until_ready(compiled(*arrays))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*arrays))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _working_bytes(shape: LayerShape) -> int:
    """Return the bytes that the backward pass needs from the forward pass, without parameters."""
    arguments = _arguments(shape)

    def pull(*arguments: Any) -> Callable:
        return _vjp(shape, *arguments)[1]

    return _kept_bytes(pull, arguments, parameters=2)


def loss_bytes(loss: Callable, outputs: PyTree, labels: PyTree, weights: PyTree) -> int:
    """Return the bytes that the loss stores for its backward, and of the outputs' gradient."""

    def pull(_: None, outputs: PyTree, labels: PyTree, weights: PyTree) -> Callable:
        def loss_of(_: None, outputs: PyTree) -> tuple[jax.Array, dict]:
            return weighted_sums(loss, outputs, labels, weights)

        return vjp(loss_of, None, outputs)[1]

    kept = _kept_bytes(pull, (None, outputs, labels, weights), parameters=1)
    return kept + tree_bytes(outputs)


def _kept_bytes(pull: Callable, arguments: tuple, *, parameters: int) -> int:
    """Return the bytes of `pull(*arguments)`, without leaves of the first arguments."""
    traced = jax.make_jaxpr(pull, axis_env=[(DATA, 1)])(*arguments).jaxpr
    stored = set(traced.invars[: len(jax.tree.leaves(arguments[:parameters]))])
    variables = {v for v in traced.outvars if not isinstance(v, jax.extend.core.Literal)}
    return tree_bytes([v.aval for v in variables - stored])
