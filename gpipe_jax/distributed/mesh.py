"""Build the device mesh, name its axes, and define the shardings of arrays.

    axis    size   along it                                    summed over it
    stage   K      the chunks of a network, one device each    tied parameters
    data    D      replicas of all stages                      gradients

Every other module takes axes, partition specs and collectives from here. For CPU devices in place
of accelerators see `simulate_devices`.

Letters: K devices along the stage axis, D replicas, M micro-batches, B examples of a micro-batch on
one replica.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.extend.backend
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpipe_jax.distributed.device_order import arrange
from gpipe_jax.errors import ArgumentError
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.xla_workarounds import backends_are_running

MeshLike = Mesh | AbstractMesh
T = TypeVar("T")

STAGE, DATA = "stage", "data"  # the axes of a mesh, in this order
_AXIS_TYPES = (AxisType.Auto,) * 2

# The shardings of arrays on a mesh.
PARAMS_SPEC = P(STAGE)  # parameters, and all in their form: axis 0 is divided between K devices
BATCH_SPEC = P(None, DATA)  # micro-batches [M, D*B, ...]: axis 1 is divided between D replicas
REPLICATED_SPEC = P()  # one copy on every device


def params_sharding(mesh: MeshLike) -> NamedSharding:
    """Return the sharding of parameters, and of all arrays in their form."""
    return NamedSharding(mesh, PARAMS_SPEC)


def batch_sharding(mesh: MeshLike) -> NamedSharding:
    """Return the sharding of micro-batches [M, D*B, ...]."""
    return NamedSharding(mesh, BATCH_SPEC)


def replicated_sharding(mesh: MeshLike) -> NamedSharding:
    """Return the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, REPLICATED_SPEC)


# --- within `jax.shard_map` -----------------------------------------------------------------------


def device_index() -> jax.Array:
    """Return k, the position of the running device along the stage axis."""
    return lax.axis_index(STAGE)


def replica_index() -> jax.Array:
    """Return the position of the running device along the data axis."""
    return lax.axis_index(DATA)


def sum_over_stages(tree: T) -> T:
    """Sum a tree of arrays over the devices of the stage axis."""
    return lax.psum(tree, STAGE)


def sum_over_replicas(tree: T) -> T:
    """Sum a tree of arrays over the replicas."""
    return lax.psum(tree, DATA)


def sum_over_all(tree: T) -> T:
    """Sum a tree of arrays over all devices."""
    return lax.psum(tree, (STAGE, DATA))


def permute_stages(array: jax.Array, pairs: Sequence[tuple[int, int]]) -> jax.Array:
    """Send an array along the stage axis, from the first to the second device of each pair."""
    return lax.ppermute(array, STAGE, pairs)


# --- building a mesh ------------------------------------------------------------------------------


def simulate_devices(n: int) -> None:
    """Make this process see `n` CPU devices, on any machine.

    Call it before anything touches a device. It restarts a backend that already runs with fewer
    devices, with a warning: arrays that exist then stay on the old devices.

    It also widens the thread pool. With fewer than two threads per device, jax 0.10 on CPU
    deadlocks in a collective when some tens of steps are queued.

    Args:
        n: The number of devices, at least 1.

    Raises:
        ValueError: `n` is less than 1.

    Example::

        gpipe.simulate_devices(8)
        mesh = gpipe.make_mesh(stages=4, data=2)
    """
    check_count("n", n)
    os.environ["PJRT_NPROC"] = str(max(2 * n, os.cpu_count() or 1))
    if backends_are_running():
        if jax.default_backend() == "cpu" and jax.device_count() >= n:
            return
        warnings.warn(
            f"simulate_devices({n}) restarts a backend that already ran with "
            f"{jax.device_count()} {jax.default_backend()} device(s); create all arrays again",
            stacklevel=2,
        )
        jax.extend.backend.clear_backends()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n)


def make_mesh(*, stages: int, data: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Make a mesh of `stages` x `data` devices with the axes "stage" and "data".

    Row k of `mesh.devices` holds the replicas of the same stages. The stage axis is the outer one:
    on several slices only boundary activations then cross the data-centre network. The order of the
    devices follows the interconnect, so neighbours in the pipeline are neighbours on the network
    (see `device_order`).

    Args:
        stages: K, the number of devices along the stage axis, at least 1.
        data: D, the number of data-parallel replicas, at least 1. Default: 1.
        devices: The devices to choose from; the first `stages` x `data` are used. They may be
            compile-only devices. Default: the devices of all processes.

    Returns:
        The mesh, of shape (stages, data), to pass to `Pipeline`.

    Raises:
        ValueError: There are too few devices, the devices cannot be arranged over the slices, or a
            process would have none of the chosen devices.

    Example::

        gpipe.simulate_devices(8)
        mesh = gpipe.make_mesh(stages=4, data=2)
    """
    stages, data = check_count("stages", stages), check_count("data", data)
    available = list(jax.devices() if devices is None else devices)
    need = stages * data
    if need > len(available):
        is_or_are = "is" if len(available) == 1 else "are"
        raise ArgumentError(
            "data" if data > stages else "stages",
            f"a mesh of {stages} stages x {data} data replicas needs {need} devices, but only "
            f"{len(available)} {is_or_are} available ({available[0].platform}); lower `stages` or "
            f"`data`, or simulate them on CPU with gpipe_jax.simulate_devices({need}) before "
            f"anything else (in a config file: mesh.simulate={need})",
        )
    chosen = available[:need]
    if devices is None:
        _check_processes(chosen, stages, data)
    # With the Explicit axes of `jax.make_mesh`, shard_map asserts instead of resharding its inputs.
    return Mesh(arrange(chosen, stages, data), (STAGE, DATA), axis_types=_AXIS_TYPES)


def _check_processes(chosen: Sequence[Any], stages: int, data: int) -> None:
    """Raise ValueError unless every process has one of the chosen devices."""
    idle = set(range(jax.process_count())) - {device.process_index for device in chosen}
    if idle:
        raise ArgumentError(
            "data" if data > stages else "stages",
            f"a mesh of {stages} stages x {data} data replicas uses {len(chosen)} of "
            f"{jax.device_count()} devices, and none of process {min(idle)}; raise `stages` or "
            f"`data`, or start fewer processes",
        )


def abstract_mesh(*, stages: int, data: int = 1) -> AbstractMesh:
    """Make a mesh without devices, for programs that are only traced or exported for TPU."""
    return AbstractMesh((stages, data), (STAGE, DATA), axis_types=_AXIS_TYPES)


# --- facts about a mesh ---------------------------------------------------------------------------


def check_axes(mesh: MeshLike) -> None:
    """Raise ValueError unless the axes have the names, order and types that `make_mesh` gives."""
    if not isinstance(mesh, MeshLike):
        raise ArgumentError(
            "mesh",
            f"`mesh` must be a mesh of devices, got {type(mesh).__name__}; give what "
            f"gpipe_jax.make_mesh(stages=..., data=...) returns",
        )
    if (mesh.axis_names, mesh.axis_types) != ((STAGE, DATA), _AXIS_TYPES):
        types = ", ".join(kind.name for kind in mesh.axis_types)
        raise ArgumentError(
            "mesh",
            f"`mesh` has the axes {mesh.axis_names} ({types}); it needs {STAGE!r} and {DATA!r} in "
            f"this order (Auto, Auto), as gpipe_jax.make_mesh(stages=..., data=...) makes them",
        )


def num_devices(mesh: MeshLike) -> int:
    """Return K, the number of devices along the stage axis."""
    return mesh.shape[STAGE]


def num_replicas(mesh: MeshLike) -> int:
    """Return D, the number of data-parallel replicas."""
    return mesh.shape[DATA]


def platform_of(mesh: MeshLike) -> str:
    """Return "cpu", "gpu" or "tpu"; an abstract mesh is one of TPUs."""
    return "tpu" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform


def check_platform(platform: str | None, default: str) -> str:
    """Return `platform`, or `default` if it is None; raise ArgumentError if it is no platform."""
    if platform is not None and platform not in ("cpu", "gpu", "tpu"):
        raise ArgumentError(
            "platform",
            f"`platform` must be 'cpu', 'gpu' or 'tpu', got {platform!r}; or leave it out",
        )
    return platform or default


def is_shared(mesh: MeshLike) -> bool:
    """Return whether the devices belong to more than one process."""
    if isinstance(mesh, AbstractMesh):
        return False
    return len({device.process_index for device in mesh.devices.flat}) > 1
