"""Show the state of a search in one line while it runs: in a notebook, on a terminal, or printed.

The line is made from the store, so another process may drive the search.
"""

import html
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from gpipe_jax.utils import progress
from nas.storage import queries
from nas.storage.reader import Reader
from nas.workers.driver import DriverThread

EVERY_S = 0.5  # between updates
FINAL_UPDATES = 6  # of a notebook, which may lose one that is sent between two cells
PRINT_EVERY_S = 10.0  # between printed lines if the number of results to come is unknown


def line(reader: Reader, cycles: int | None = None) -> str:
    """Return the line: the number of results (of `cycles`, if given), the best, and counts."""
    counts, best = reader.counts(), next(reader.ranked(), None)
    total = "" if cycles is None else f"/{cycles}"
    phrases = [f"{counts.results}{total} results"]
    if best is not None:
        phrases.append(f"best {best.fitness:.6g} (#{best.id})")
    phrases.append(f"{counts.evaluations} evaluations")
    for number, text in (
        (counts.cache_hits, "from the cache"),
        (counts.rejected, "rejected"),
        (counts.failures, "failures"),
        (counts.running, "running"),
    ):
        if number > 0:
            phrases.append(f"{number} {text}")
    return ", ".join(phrases)


def watch(path: Path, driver: DriverThread | None = None, every_s: float = EVERY_S) -> None:
    """Show the line until no driver is running.

    In a notebook this returns at once, and a thread updates the line; elsewhere it waits.

    Args:
        path: Folder or file of the run.
        driver: The driver, if it runs in this process.
        every_s: Seconds between updates.
    """
    cycles = driver.cycles if driver else None
    if in_notebook():
        arguments = (path, driver, every_s, _notebook_cell())
        threading.Thread(target=_follow, args=arguments, name="nas watch", daemon=True).start()
        return
    console = Console()
    show = _terminal(console) if console.is_terminal else _printed(cycles)
    _follow(path, driver, every_s, show)


Show = Callable[[str, int, bool], None]
"""A function of the line, the number of results, and whether this is the last line."""


def _follow(path: Path, driver: DriverThread | None, every_s: float, show: Show) -> None:
    reader = Reader(path)  # each thread needs its own
    cycles = driver.cycles if driver else None
    try:
        while True:
            is_over = not queries.is_running(reader)
            # Before the line: `_end` waits for the driver, which may still store a result.
            end = f"; {_end(driver)}" if is_over else ""
            show(line(reader, cycles) + end, reader.counts().results, is_over)
            if is_over:
                return
            time.sleep(every_s)
    finally:
        reader.close()


def _end(driver: DriverThread | None) -> str:
    error = driver.error if driver else None
    return f"stopped by {type(error).__name__}: {error}" if error else "not running"


def in_notebook() -> bool:
    """Return whether this process is a Jupyter kernel."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None


def _notebook_cell() -> Show:
    from IPython.display import HTML, display

    handle: Any = display(HTML(""), display_id=True)

    def show(text: str, _: int, is_last: bool) -> None:
        content = HTML(f"<code>{html.escape(text)}</code>")
        handle.update(content)
        if is_last:
            for _ in range(FINAL_UPDATES - 1):
                time.sleep(EVERY_S)
                handle.update(content)

    return show


def _terminal(console: Console) -> Show:
    in_place = progress.passing(console)

    def show(text: str, _: int, is_last: bool) -> None:
        in_place(text)
        if is_last:
            console.print()

    return show


def _printed(cycles: int | None) -> Show:
    """Print a line at every tenth of the results, or at intervals if their number is unknown."""
    last_tenth, last_time = -1, 0.0

    def show(text: str, results: int, is_last: bool) -> None:
        nonlocal last_tenth, last_time
        if cycles is None:
            is_due = time.monotonic() - last_time > PRINT_EVERY_S
        else:
            tenth = results * 10 // cycles
            is_due, last_tenth = tenth != last_tenth, tenth
        if is_due or is_last:
            print(text, flush=True)
            last_time = time.monotonic()

    return show
