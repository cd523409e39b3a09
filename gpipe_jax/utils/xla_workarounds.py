"""Collect the workarounds for XLA and JAX, each with the test that shows when it can go.

All were seen with jax 0.10.2, jaxlib 0.10.2 and libtpu 0.0.42. A test named `test_without_...` is
marked `xfail` and runs without the workaround: if it passes on all supported versions, delete the
workaround. The tests are in `tests/utils/test_xla_workarounds.py`, or in the file named.

    function              what goes wrong without it                         test
    recompute_from        all: the forward pass stores what it should not    recompute_from
    read_after            TPU: parameters are converted ahead of all loops   without_read_after
    run_branch            TPU: what passes through a `lax.switch` is copied  without_run_branch
    flat_examples         TPU: all inputs get the padded layout of a slice   without_flat_examples
    ring                  GPU: permutes with several cycles go wrong         (the issue below)
    computed_once         CPU: a value is computed again, rounded otherwise  test_pooling
    backends_are_running  JAX has no public function for this                private_functions
    detect_cluster        JAX has no public function for this                private_functions
    jax_setting           JAX: type stubs do not list the settings           pyright

These are structures, so they stay where they are:

* `layers.conv` writes the gradients of convolutions, and depthwise convolutions, in forms that
  XLA:CPU runs fast. XLA:CPU rewrites a convolution to its fast path only in the entry computation
  of a program. Inside a scan a gradient took 14.5 s instead of 0.36 s; in this form 0.25 s. Test:
  `tests/layers/test_conv.py` (plain convolutions in a scan have three layouts, ours have one).
* `layers.pooling` writes pooling on CPU over whole shifted images, about ten times faster than
  XLA:CPU's own. Test: `tests/layers/test_pooling.py`.
* `layers.batch_norm.WholeStatistic` avoids a search of the whole traced program by Flax 0.12.8.
  Test: `tests/layers/test_batch_norm.py`.
* `distributed.mesh.simulate_devices` widens the thread pool of XLA:CPU. With fewer than two threads
  per device, a collective deadlocks when some tens of steps are queued.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from gpipe_jax.utils.trees import PyTree

T = TypeVar("T")

# --- XLA, all platforms ---------------------------------------------------------------------------


def recompute_from(stored: T) -> T:
    """Return `stored`, and make XLA recompute the values that follow from it.

    Without the barrier XLA finds that it has computed the same values in the forward pass. It then
    stores those values instead of `stored`.
    """
    return lax.optimization_barrier(stored)


# --- XLA:TPU --------------------------------------------------------------------------------------


def read_after(params: PyTree, x: PyTree, index: Any) -> tuple[PyTree, PyTree]:
    """Return `params` and `x`, such that XLA can use `params` only once `x` is known.

    Without it XLA converts all parameters to bfloat16 ahead of all loops and stores the copies, or
    converts a whole pack to take one layer out of it. On TPU a step then held 6 to 7 times its
    parameters. A barrier alone is not enough: XLA moves conversions ahead of it, unless the
    parameters are also used as they are. So `x` depends on a sum over all of them, in a case that
    never happens.

    Args:
        params: Any tree of arrays.
        x: The tree of arrays to wait for.
        index: An integer that is never negative, and that XLA does not know.
    """
    params, x = lax.optimization_barrier((params, x))
    never, total = index < 0, jnp.float32(0)
    for a in filter(jnp.size, jax.tree.leaves(params)):
        total += a[(0,) * a.ndim].astype(jnp.float32)
    return params, jax.tree.map(lambda a: jnp.where(never, total.astype(a.dtype), a), x)


def run_branch(index: Any, branches: Sequence[Callable[[T], T]], operand: T) -> T:
    """Return `branches[index](operand)`, as one conditional for each branch.

    XLA:TPU adds to the sums in `operand` in place. It copies what passes through a `lax.switch`:
    1.5 GiB for 2.7 GiB of gradients on v3.
    """
    if len(branches) == 1:
        return branches[0](operand)
    for n, branch in enumerate(branches):
        operand = lax.cond(index == n, branch, _same, operand)
    return operand


def _same(operand: T) -> T:
    return operand


def flat_examples(a: jax.Array) -> jax.Array:
    """Return inputs [M, ...] as [M, elements of a micro-batch]; reshape them within the loop.

    XLA:TPU gives an array that a loop slices the layout that the user of the slices prefers. The
    padded layout of a convolution made 3 GiB of 77 MB of images, twice.
    """
    return a.reshape(a.shape[0], math.prod(a.shape[1:]))


# --- XLA:GPU --------------------------------------------------------------------------------------


def ring(num_devices: int, *, closed: bool) -> list[tuple[int, int]]:
    """Return the pairs (device, next device) of a permute; the last device sends if `closed`.

    Close the ring only where a schedule needs it. XLA:GPU miscompiles a permute with more than one
    cycle, as with several replicas: https://github.com/openxla/xla/issues/45222.
    """
    pairs = [(k, k + 1) for k in range(num_devices - 1)]
    if closed:
        pairs.append((num_devices - 1, 0))
    return pairs


# --- XLA:CPU --------------------------------------------------------------------------------------


def computed_once(a: jax.Array) -> jax.Array:
    """Return the integers `a` [B, H, W, C], from 0 up, such that XLA:CPU computes them only once.

    XLA:CPU would compute them again for each reader, and round what they come from in other ways.
    In pooling, windows with two almost equal maxima then choose both or none. An optimization
    barrier is removed too early. A loop stays: XLA does not know that it is never entered.
    """
    rounds = (a[:1, :1, :1, :1].sum() < 0).astype(jnp.int32)

    def is_left(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        return carry[0] > 0

    def change(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return carry[0] - 1, -carry[1]

    return lax.while_loop(is_left, change, (rounds, a))[1]


# --- private functions of JAX, and its types ------------------------------------------------------


def backends_are_running() -> bool:
    """Return whether JAX has started a backend; every public function would start one.

    Without the private function the answer is yes, which is safe: the caller restarts the backend.
    """
    try:
        from jax._src.xla_bridge import backends_are_initialized
    except ImportError:
        return True
    return backends_are_initialized()


def jax_setting(name: str) -> Any:
    """Return a setting of `jax.config`, which has attributes that its type stubs do not list."""
    return getattr(jax.config, name)


def detect_cluster(timeout_s: int) -> tuple[str | None, int | None, int | None]:
    """Return (coordinator, number of processes, index) as `jax.distributed.initialize` finds them.

    All are None if there is no cluster. The public function fails in that case.

    Raises:
        RuntimeError: This version of JAX has no such private function.
    """
    try:
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            f"jax {jax.__version__} does not detect clusters in the way that gpipe_jax expects; "
            f"give the coordinator, the number of processes and the index of this one yourself"
        ) from error
    coordinator, count, index, _ = detect(None, None, None, None, None, timeout_s)
    return coordinator, count, index
