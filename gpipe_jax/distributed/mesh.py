"""The devices: a mesh of K stages x D data replicas, and CPU devices to stand in for them."""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.extend.backend
from jax.sharding import AbstractMesh, AxisType, Mesh

from gpipe_jax.distributed.device_order import arrange

STAGE, DATA = "stage", "data"


def simulate_devices(n: int) -> None:
    """Make this process see `n` CPU devices, on any machine.

    Call it before anything touches a device. If a backend is already running with fewer devices it
    is restarted with a warning: arrays made before stay on the devices that are gone.

    The thread pool is widened too: with fewer than two threads a device, jax 0.10 on CPU deadlocks
    in a collective once some tens of steps are queued.
    """
    if n < 1:
        raise ValueError(f"`n` must be at least 1 device, got {n}")
    os.environ["PJRT_NPROC"] = str(max(2 * n, os.cpu_count() or 1))
    if _backend_is_running():
        if jax.default_backend() == "cpu" and jax.device_count() >= n:
            return
        warnings.warn(
            f"simulate_devices({n}) restarts a backend that already ran with "
            f"{jax.device_count()} {jax.default_backend()} device(s); make arrays anew after it",
            stacklevel=2,
        )
        jax.extend.backend.clear_backends()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n)


def _backend_is_running() -> bool:
    from jax._src import xla_bridge  # the public API has no question that does not start a backend

    return xla_bridge.backends_are_initialized()


def make_mesh(*, stages: int, data: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `stage` (outermost) and `data`; stage k lives on `mesh.devices[k]`.

    `stage` is outermost so that on several slices only boundary activations cross the data-centre
    network, and device order follows the interconnect, so that neighbouring stages are neighbours
    (see `placement`).
    `devices` default to all of this process's devices; they may be compile-only ones.
    """
    for name, value in (("stages", stages), ("data", data)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    found = list(jax.devices() if devices is None else devices)
    need = stages * data
    if need > len(found):
        raise ValueError(
            f"a mesh of {stages} stages x {data} data replicas needs {need} devices, but there are "
            f"{len(found)} ({found[0].platform}); lower `stages` or `data`, or simulate them "
            f"on CPU with gpipe_jax.simulate_devices({need}) before anything else "
            f"(in a config file: mesh.simulate={need})"
        )
    if devices is None:
        _check_processes(found[:need], stages, data)
    grid = arrange(found[:need], stages, data)
    # make_mesh's Explicit axes would make shard_map assert instead of resharding its inputs.
    return Mesh(grid, (STAGE, DATA), axis_types=(AxisType.Auto,) * 2)


def _check_processes(chosen: Sequence[Any], stages: int, data: int) -> None:
    idle = set(range(jax.process_count())) - {device.process_index for device in chosen}
    if idle:
        raise ValueError(
            f"a mesh of {stages} stages x {data} data replicas uses {len(chosen)} of "
            f"{jax.device_count()} devices, and none of process {min(idle)}; raise `stages` or "
            f"`data`, or start fewer processes"
        )


def abstract_mesh(*, stages: int, data: int = 1) -> AbstractMesh:
    """A mesh of TPU devices that are nowhere: programs for it can be traced and exported only."""
    return AbstractMesh((stages, data), (STAGE, DATA), axis_types=(AxisType.Auto,) * 2)


def check_axes(mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError unless the axes are those of `make_mesh`: their names, order and types."""
    axes = (mesh.axis_names, mesh.axis_types)
    if axes != ((STAGE, DATA), (AxisType.Auto,) * 2):
        types = ", ".join(kind.name for kind in mesh.axis_types)
        raise ValueError(
            f"`mesh` has the axes {mesh.axis_names} ({types}); it needs {STAGE!r} and {DATA!r} in "
            f"this order (Auto, Auto), as gpipe_jax.make_mesh(stages=..., data=...) makes them"
        )


def platform_of(mesh: Mesh | AbstractMesh) -> str:
    """ "cpu", "gpu" or "tpu"; an abstract mesh is one of TPUs."""
    return "tpu" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform


def is_shared(mesh: Mesh | AbstractMesh) -> bool:
    """Whether its devices are those of more than one process."""
    if isinstance(mesh, AbstractMesh):
        return False
    return len({device.process_index for device in mesh.devices.flat}) > 1
