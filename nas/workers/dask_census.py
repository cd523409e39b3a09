"""Count the workers of a dask cluster while the search runs: they may come and go."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

COUNT_S = 1.0  # s between two counts
ANSWER_S = 10.0  # s in which a scheduler must answer


class Census:
    """Know how many jobs a cluster runs at once; 0 while its scheduler does not answer.

    A thread counts, so that a scheduler that hangs does not stop the driver. A scheduler that was
    started again knows nothing: `on_reconnect` tells it what it needs before there are slots.
    """

    def __init__(self, client: Any) -> None:
        self._client, self._connection = client, client.scheduler_comm
        self.on_reconnect: Callable[[], object] = lambda: None
        self._threads = self._ask()
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="nas census", daemon=True).start()

    def count(self) -> int:
        """Return the number of the workers' threads at the last count."""
        return self._threads if self._client.status == "running" and self._is_same else 0

    def close(self) -> None:
        """End the thread soon."""
        self._closed.set()

    @property
    def _is_same(self) -> bool:
        return self._client.scheduler_comm is self._connection

    def _run(self) -> None:
        while not self._closed.wait(COUNT_S):
            self._threads = self._ask()
            if self._threads and not self._is_same:
                connection = self._client.scheduler_comm
                with suppress(Exception):  # as in `_ask`: the next count tries again
                    self.on_reconnect()
                    self._connection = connection

    def _ask(self) -> int:
        client = self._client
        try:
            threads = client.sync(client.scheduler.ncores, callback_timeout=ANSWER_S)
        except Exception:  # of the network, or of a client that connects again or is closed
            return 0
        return sum(threads.values())
