"""Ask a search for jobs in threads, so that limits of several candidates are measured at once."""

import os
from collections.abc import Callable
from concurrent.futures import Future

from nas.ask_tell.search import Search
from nas.evaluators.evaluator import Job
from nas.workers.threads import DaemonThreads

MAX_AT_ONCE = os.cpu_count() or 1  # a measure may be a compiler, with a process of its own


class AskingThreads:
    """Count the questions that have no answer yet."""

    def __init__(self, search: Search, until: Callable[[], bool]) -> None:
        self._search, self._until = search, until
        self._threads = DaemonThreads()
        self.count = 0

    @property
    def is_full(self) -> bool:
        """Return whether one question more would be too many at once."""
        return self.count >= MAX_AT_ONCE

    def ask(self, on_answer: Callable[[Future], None]) -> None:
        """Ask for one job; `on_answer` gets the future, in the thread."""
        self.count += 1
        self._threads.submit(self._search.ask, self._until).add_done_callback(on_answer)

    def take(self, answer: Future) -> Job | None:
        """Return the job of an answer, or None if there is none now; raise what `ask` raised."""
        self.count -= 1
        return answer.result()

    def close(self) -> None:
        """End the threads; those that measure end later, and change nothing."""
        self._threads.close()
