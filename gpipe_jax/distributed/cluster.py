"""Find which process of a run this one is, from options or from the environment."""

import os
from typing import Any, NamedTuple

from gpipe_jax.errors import ArgumentError

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

    Returns None for a single process. Raises ArgumentError if the request is
    incomplete, and OSError if the network fails during the detection.
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
    given = {
        "coordinator": coordinator,
        "num_processes": num_processes,
        "process_index": process_index,
    }
    for argument, value in given.items():
        if value is None:
            raise ArgumentError(
                argument,
                "several processes need the address of the first (HOST:PORT), their number and "
                "the index of this one, as options or in JAX_COORDINATOR_ADDRESS, "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID; give all three",
            )
    count = _whole_number("num_processes", "JAX_NUM_PROCESSES", num_processes)
    index = _whole_number("process_index", "JAX_PROCESS_ID", process_index)
    if count < 1:
        raise ArgumentError("num_processes", f"there must be at least 1 process, got {count}")
    if not 0 <= index < count:
        raise ArgumentError(
            "process_index", f"{index} of {count} processes: they count from 0 to {count - 1}"
        )
    if not coordinator.rpartition(":")[2].isdecimal():
        raise ArgumentError("coordinator", f"{coordinator} has no port; write it as HOST:PORT")
    return Cluster(coordinator, count, index)


def _whole_number(argument: str, variable: str, value: Any) -> int:
    try:
        return int(value)
    except ValueError as error:  # only variables of the environment are text
        raise ArgumentError(argument, f"{variable} must be a whole number, got {value}") from error
