"""Find which process of a run this one is, from options or from the environment."""

import os
from typing import Any, NamedTuple

TIMEOUT_S = 300


class Cluster(NamedTuple):
    """Hold the number of processes of a run, and the index of this one."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_index: int

    @property
    def label(self) -> str:
        """Return the name of this process in messages, which count from 1."""
        return f"host {self.process_index + 1} of {self.num_processes}"


def find(
    coordinator: str | None, num_processes: int | None, process_index: int | None
) -> Cluster | None:
    """Return the requested cluster, or the one that JAX detects (TPU pods, Slurm, MPI).

    Returns None for a single process. Raises ValueError if the request is incomplete.
    """
    requested = _requested(coordinator, num_processes, process_index)
    if any(value is not None for value in requested):
        return _check(*requested)
    from gpipe_jax.utils.xla_workarounds import detect_cluster

    coordinator, num_processes, process_index = detect_cluster(TIMEOUT_S)
    if coordinator is None or num_processes is None or process_index is None:
        return None
    return Cluster(coordinator, num_processes, process_index) if num_processes > 1 else None


def is_requested(
    coordinator: str | None, num_processes: int | None, process_index: int | None
) -> bool:
    """Return whether options or environment variables request several processes."""
    return any(value is not None for value in _requested(coordinator, num_processes, process_index))


def _requested(*options: str | int | None) -> list[str | int | None]:
    """Return the options, and environment variables in place of those that are None."""
    environment = (os.environ.get(f"JAX_{name}") for name in _VARIABLES)
    return [
        option if option is not None else variable
        for option, variable in zip(options, environment, strict=True)
    ]


_VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def _check(coordinator: Any, num_processes: Any, process_index: Any) -> Cluster:
    if coordinator is None or num_processes is None or process_index is None:
        raise ValueError(
            "several processes need --coordinator HOST:PORT (of the first), --processes N and "
            "--process I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; give "
            "all three"
        )
    try:
        cluster = Cluster(coordinator, int(num_processes), int(process_index))
    except ValueError as error:
        raise ValueError(
            f"JAX_NUM_PROCESSES {num_processes} and JAX_PROCESS_ID {process_index} must be whole "
            f"numbers"
        ) from error
    if not 0 <= cluster.process_index < cluster.num_processes:
        raise ValueError(
            f"--process {process_index} of --processes {num_processes}: processes count from 0 to "
            f"{cluster.num_processes - 1}"
        )
    if not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator {coordinator} has no port; write it as HOST:PORT")
    return cluster
