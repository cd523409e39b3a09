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

from gpipe_jax import progress
from gpipe_jax.utils.messages import write
from nas.evolution.length import Length
from nas.storage import queries
from nas.storage.reader import Counts, Reader
from nas.workers.driver import DriverThread

EVERY_S = 0.5  # between updates
FINAL_UPDATES = 6  # of a notebook, which may lose one that is sent between two cells
PRINT_EVERY_S = 10.0  # between printed lines if the number of results to come is unknown


def line(reader: Reader, length: Length | None = None) -> str:
    """Return the line: the number of results, the best, and counts; of the total, if known."""
    counts, best = reader.counts(), next(reader.ranked(), None)
    total = {} if length is None else {length.noun: f"/{length.total}"}
    phrases = [f"{counts.results}{total.get('results', '')} results"]
    if best is not None:
        phrases.append(f"best {best.fitness:.6g} (#{best.id})")
    phrases.append(f"{counts.evaluations}{total.get('evaluations', '')} evaluations")
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
    if in_notebook():
        arguments = (path, driver, every_s, _notebook_cell())
        threading.Thread(target=_follow, args=arguments, name="nas watch", daemon=True).start()
        return
    console = Console()
    length = driver.length if driver else None
    show = _terminal(console) if console.is_terminal else _printed(length)
    _follow(path, driver, every_s, show)


Show = Callable[[str, Counts, bool], None]
"""Show the line; take the counts too, and whether this is the last line."""


def _follow(path: Path, driver: DriverThread | None, every_s: float, show: Show) -> None:
    reader = Reader(path)  # each thread needs its own
    length = driver.length if driver else None
    try:
        while True:
            is_over = not queries.is_running(reader)
            # Before the line: `_end` waits for the driver, which may still store a result.
            end = f"; {_end(driver)}" if is_over else ""
            show(line(reader, length) + end, reader.counts(), is_over)
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

    def show(text: str, _: Counts, is_last: bool) -> None:
        content = HTML(f"<code>{html.escape(text)}</code>")
        handle.update(content)
        if is_last:
            for _update in range(FINAL_UPDATES - 1):
                time.sleep(EVERY_S)
                handle.update(content)

    return show


def _terminal(console: Console) -> Show:
    in_place = progress.passing(console)

    def show(text: str, _: Counts, is_last: bool) -> None:
        in_place(text)
        if is_last:
            console.print()

    return show


def _printed(length: Length | None) -> Show:
    """Print a line at every tenth of the search, or at intervals if its length is unknown."""
    last_tenth, last_time = -1, 0.0

    def show(text: str, counts: Counts, is_last: bool) -> None:
        nonlocal last_tenth, last_time
        if length is None:
            is_due = time.monotonic() - last_time > PRINT_EVERY_S
        else:
            tenth = length.done(counts.results, counts.evaluations) * 10 // length.total
            is_due, last_tenth = tenth != last_tenth, tenth
        if is_due or is_last:
            write(text)
            last_time = time.monotonic()

    return show
