"""What each layer costs: time, and bytes of parameters, of working set and of output.

Costs feed the partitioner. Times are estimates in seconds, from the count of floating-point
operations at a nominal rate, or measured; only their ratios matter.
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
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.layer import Context
from gpipe_jax.layers.shape_inference import LayerShape, as_replica
from gpipe_jax.losses import weighted_sums
from gpipe_jax.partition.flops import count_flops
from gpipe_jax.utils.trees import PyTree, float_leaves, signature, tree_bytes, vjp

# Nominal (floating-point operations, bytes over the link to the next stage) in a second, to weigh
# compute against transfer. Orders of magnitude: what a matrix unit and one interconnect link of a
# current device sustain, and what a core and its memory do for a simulated CPU mesh.
NOMINAL_RATES = {"cpu": (2e10, 5e9), "gpu": (1e14, 5e10), "tpu": (1e14, 5e10)}


class LayerCost(NamedTuple):
    """One layer, one micro-batch on one replica."""

    compute_s: float  # forward (recomputed) and backward: a backward slot's time
    parameter_bytes: int
    working_bytes: int  # kept between the layer's forward and its backward
    boundary_bytes: int  # what passes on behind it: its output, and stashed tensors on their way


def measure(
    shapes: Sequence[LayerShape],
    kind: str | Sequence[float],
    platform: str,
    *,
    shared: bool = False,
) -> list[LayerCost]:
    """The cost of every layer; equal layers are looked at once.

    `kind` is "flops" (of the platform's program, see `count_flops`), "time" (run here, median of
    five), or the costs themselves, one number for each layer in any unit. Where the network is
    `shared` by all processes the first one's times count, and every process must ask.
    """
    if not isinstance(kind, str):
        if len(kind) != len(shapes):
            raise ValueError(
                f"`cost` has {len(kind)} numbers for {len(shapes)} layers; give one each"
            )
        times = [float(c) for c in kind]
    elif kind in ("flops", "time"):
        rate = NOMINAL_RATES.get(platform, NOMINAL_RATES["tpu"])[0]
        flops_s = lambda program, specs: count_flops(program, specs, platform) / rate  # noqa: E731
        one = _measured_time if kind == "time" else flops_s
        times = _each_distinct(shapes, lambda shape: one(*_training_program(shape)))
        if kind == "time" and shared:  # each process measures its own, and all must cut alike
            times = [us / 1e6 for us in processes.from_first([round(1e6 * t) for t in times])]
    else:
        raise ValueError(f"`cost` must be 'flops', 'time' or one number a layer, got {kind!r}")
    working = _each_distinct(shapes, _working_bytes)
    behind = [*(shape.boundary for shape in shapes[1:]), shapes[-1].output]
    return [
        LayerCost(t, tree_bytes((s.params, s.stats)), w, tree_bytes(after))
        for t, w, s, after in zip(times, working, shapes, behind, strict=True)
    ]


def transfer_s(costs: Sequence[LayerCost], platform: str) -> list[float]:
    """Time to send each layer's output to the next stage and to get its gradient back."""
    rate = NOMINAL_RATES.get(platform, NOMINAL_RATES["tpu"])[1]
    return [2 * cost.boundary_bytes / rate for cost in costs]


def _each_distinct(shapes: Sequence[LayerShape], function: Callable) -> list:
    known: dict = {}
    names = [(shape.layer, signature(shape.input)) for shape in shapes]
    for name, shape in zip(names, shapes, strict=True):
        if name not in known:
            known[name] = function(shape)
    return [known[name] for name in names]


def _training_program(shape: LayerShape) -> tuple[Callable, tuple]:
    """The layer's forward and backward, and the shapes to call it with."""

    def program(*arguments: Any) -> PyTree:
        y, pull = _vjp(shape, *arguments)
        return y, pull([jnp.ones_like(a) for a in y])

    return as_replica(program), _arguments(shape)


def _arguments(shape: LayerShape) -> tuple:
    """Shapes of parameters, with those that the layer borrows, statistics, input and seed."""
    params = skips_and_ties.fill(shape.layer, shape.params, shape.borrowed)
    return params, shape.stats, shape.input, jax.ShapeDtypeStruct((), jnp.uint32)


def _vjp(
    shape: LayerShape, params: PyTree, stats: PyTree, x: PyTree, seed: jax.Array
) -> tuple[list, Callable]:
    """Differentiate in the parameters and in the floating-point inputs."""

    def run(params: PyTree, x: PyTree) -> tuple[PyTree, None]:
        context = Context(jax.random.key(seed), train=True)
        return shape.layer.apply(params, stats, x, context)[0], None

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
    """Bytes of what the backward pass needs from the forward pass, parameters aside."""
    arguments = _arguments(shape)
    return _kept_bytes(lambda *arguments: _vjp(shape, *arguments)[1], arguments)


def loss_bytes(loss: Callable, outputs: PyTree, labels: PyTree, weights: PyTree) -> int:
    """Bytes of what the loss keeps for its backward, and of the gradient of the outputs."""

    def pull(_: None, outputs: PyTree, labels: PyTree, weights: PyTree) -> Callable:
        of_outputs = lambda _, y: weighted_sums(loss, y, labels, weights)  # noqa: E731
        return vjp(of_outputs, None, outputs)[1]

    return _kept_bytes(pull, (None, outputs, labels, weights)) + tree_bytes(outputs)


def _kept_bytes(pull: Callable, arguments: tuple) -> int:
    """Bytes of what `pull(*arguments)` returns and is not among its first argument's leaves."""
    traced = jax.make_jaxpr(pull, axis_env=[(DATA, 1)])(*arguments).jaxpr
    parameters = set(traced.invars[: len(jax.tree.leaves(arguments[0]))])
    variables = {v for v in traced.outvars if not isinstance(v, jax.extend.core.Literal)}
    return tree_bytes([v.aval for v in variables - parameters])
