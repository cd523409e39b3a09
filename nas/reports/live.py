"""A line on a search while it runs: in a notebook's cell, on a terminal, or as plain lines.

It is read from the store, so that it can be of a search that another process drives.
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

EVERY_S = 0.5
FINAL_TIMES = 6  # what is sent between two cells can get lost, and nothing comes after the end
PLAIN_S = 10.0  # between plain lines, where it is not known how many results there will be


def line(reader: Reader, cycles: int | None = None) -> str:
    """How far a search has come, of `cycles` results if that is known."""
    counts, best = reader.counts(), next(reader.ranked(), None)
    parts = [f"{counts.results}{f'/{cycles}' if cycles else ''} results"]
    if best is not None:
        parts.append(f"best {best.fitness:.6g} (#{best.id})")
    parts.append(f"{counts.evaluations} evaluations")
    for number, words in (
        (counts.cache_hits, "from the cache"),
        (counts.rejected, "rejected"),
        (counts.failures, "failures"),
        (counts.running, "under way"),
    ):
        parts += [f"{number} {words}"] * (number > 0)
    return ", ".join(parts)


def watch(path: Path, running: DriverThread | None = None, every_s: float = EVERY_S) -> None:
    """Show the line until no driver is at work; a notebook goes on meanwhile, others wait.

    `running` is the driver, if it is one of this process.
    """
    cycles = running.cycles if running else None
    if in_notebook():
        arguments = (path, running, every_s, _notebook_cell())
        threading.Thread(target=_follow, args=arguments, name="nas watch", daemon=True).start()
        return
    console = Console()
    show = _terminal(console) if console.is_terminal else _plain(cycles)
    _follow(path, running, every_s, show)


Show = Callable[[str, int, bool], None]  # of a line, the number of results, and whether it is over


def _follow(path: Path, running: DriverThread | None, every_s: float, show: Show) -> None:
    reader, cycles = Reader(path), running.cycles if running else None  # this thread's own reader
    try:
        while True:
            over = not queries.is_driven(reader)
            end = f"; {_end(running)}" if over else ""  # first: it waits for the driver
            text = line(reader, cycles) + end
            show(text, reader.counts().results, over)
            if over:
                return
            time.sleep(every_s)
    finally:
        reader.close()


def _end(running: DriverThread | None) -> str:
    error = running.error if running else None
    return f"stopped by {type(error).__name__}: {error}" if error else "no driver is at work"


def in_notebook() -> bool:
    """Whether this is a kernel of Jupyter's."""
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None


def _notebook_cell() -> Show:
    from IPython.display import HTML, display

    handle: Any = display(HTML(""), display_id=True)

    def show(text: str, _: int, over: bool) -> None:
        for again in range(FINAL_TIMES if over else 1):
            time.sleep(EVERY_S * bool(again))
            handle.update(HTML(f"<code>{html.escape(text)}</code>"))

    return show


def _terminal(console: Console) -> Show:
    in_place = progress.passing(console)

    def show(text: str, _: int, over: bool) -> None:
        in_place(text)
        if over:
            console.print()

    return show


def _plain(cycles: int | None) -> Show:
    """A line at every tenth of the results, or now and then."""
    last = [-1, 0.0]

    def show(text: str, results: int, over: bool) -> None:
        step = results * 10 // cycles if cycles else last[0]
        if over or step != last[0] or (not cycles and time.monotonic() - last[1] > PLAIN_S):
            print(text, flush=True)
            last[:] = step, time.monotonic()

    return show
