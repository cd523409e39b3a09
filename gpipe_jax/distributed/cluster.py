"""Which process of a run this is: as asked for, or as the environment tells."""

import os
from typing import Any, NamedTuple

TIMEOUT_S = 300


class Cluster(NamedTuple):
    """The processes of a run, as one of them sees it."""

    coordinator: str  # host:port of process 0
    count: int
    index: int

    @property
    def me(self) -> str:
        """This process, in messages, which count from 1."""
        return f"host {self.index + 1} of {self.count}"


def find(coordinator: str | None, count: int | None, index: int | None) -> Cluster | None:
    """The cluster asked for, or the one that JAX detects (TPU pods, Slurm, MPI); None if alone.

    Raises ValueError if something is missing to it.
    """
    given = _asked(coordinator, count, index)
    if any(value is not None for value in given):
        return _check(*given)
    from gpipe_jax.utils.xla_workarounds import detect_cluster

    coordinator, count, index = detect_cluster(TIMEOUT_S)
    if coordinator is None or count is None or index is None or count == 1:
        return None
    return Cluster(coordinator, count, index)


def is_asked(coordinator: str | None, count: int | None, index: int | None) -> bool:
    """Whether several processes are asked for, by options or environment variables."""
    return any(value is not None for value in _asked(coordinator, count, index))


def _asked(*options: str | int | None) -> list[str | int | None]:
    environment = (os.environ.get(f"JAX_{name}") for name in _VARIABLES)
    return [a if a is not None else b for a, b in zip(options, environment, strict=True)]


_VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")


def _check(coordinator: Any, count: Any, index: Any) -> Cluster:
    if coordinator is None or count is None or index is None:
        raise ValueError(
            "several processes need --coordinator HOST:PORT (of the first), --processes N and "
            "--process I, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; give "
            "all three"
        )
    try:
        cluster = Cluster(coordinator, int(count), int(index))
    except ValueError as error:
        raise ValueError(
            f"JAX_NUM_PROCESSES {count} and JAX_PROCESS_ID {index} must be numbers"
        ) from error
    if not 0 <= cluster.index < cluster.count:
        raise ValueError(
            f"--process {index} of --processes {count}: processes count from 0 to "
            f"{cluster.count - 1}"
        )
    if not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator {coordinator} has no port; write it as HOST:PORT")
    return cluster
