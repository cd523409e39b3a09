"""Notice a script that starts its search again in each worker process, as it has no main guard.

A process that is spawned imports the script of its parent. A search in the script's body begins
there too, before the process can work.
"""

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager

from nas.errors import WorkersError

ADVICE = (
    "in a script, call nas.search under `if __name__ == '__main__':`, because each worker process "
    "imports the script"
)
_QUIET = "NAS_PARENT_REPORTS"  # set for processes whose parent explains why they ended


def check_not_importing() -> None:
    """End a worker process in which a script starts its search again.

    Raises:
        SystemExit: This process is such a worker, of a pool that reports the mistake.
        WorkersError: It is one of any other parent.
    """
    if not getattr(multiprocessing.current_process(), "_inheriting", False):
        return
    if _QUIET in os.environ:
        raise SystemExit(1)
    raise WorkersError(f"a worker process started a search while it was started itself; {ADVICE}")


@contextmanager
def quiet_workers() -> Iterator[None]:
    """Let worker processes that start within this block end without a traceback."""
    os.environ[_QUIET] = "1"
    try:
        yield
    finally:
        os.environ.pop(_QUIET, None)  # another search may have ended before
