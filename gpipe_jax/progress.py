"""Show the progress of a command: a bar on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpipe_jax.utils.messages import printable, write
from gpipe_jax.utils.text import format_value

Show = Callable[[dict], None]

_DESCRIPTION = TextColumn("{task.description}", markup=False)


@contextlib.contextmanager
def show(
    steps: int | None, every: int, console: Console | None = None, *, quiet: bool = False
) -> Iterator[Show]:
    """Yield a function that shows a record of a training run.

    Args:
        steps: Number of steps of the run; None if it is not known.
        every: Steps between plain lines; a bar shows every step.
        console: Where to write. Default: standard output.
        quiet: Show nothing, as in all processes but the first.
    """
    if quiet:
        yield lambda record: None
        return
    console = console or Console()
    if not console.is_terminal:
        yield lambda record: _print_line(record, steps, every)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), _DESCRIPTION)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=steps)

        def update(record: dict) -> None:
            if "loss" in record:
                bar.update(task, completed=record["step"], description=printable(_values(record)))
            else:
                line = printable(f"step {record['step']}: {_values(record)}")
                bar.console.print(line, highlight=False, markup=False)

        yield update


@contextlib.contextmanager
def counting(total: int, noun: str) -> Iterator[Callable[[int, str], None]]:
    """Yield a function of (number done, text) that shows the progress of a count.

    Args:
        total: The number at the end. Plain lines are printed at every tenth of it.
        noun: What is counted, in the plural.
    """
    console = Console()
    if not console.is_terminal:
        shown = 0

        def line(done: int, text: str) -> None:
            nonlocal shown
            if done * 10 // total > shown * 10 // total:
                write(f"{done}/{total} {noun}: {text}")
                shown = done

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), _DESCRIPTION)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)

        def update(done: int, text: str) -> None:
            bar.update(task, completed=done, description=printable(f"{noun}, {text}"))

        yield update


def passing(console: Console | None = None) -> Callable[[str], None]:
    """Return a function that shows the current activity; on a terminal it replaces the last one.

    Args:
        console: Where to write. Default: standard error.
    """
    console = console or Console(stderr=True)
    end = "\r" if console.is_terminal else "\n"

    def show_activity(text: str) -> None:
        line = printable(text).ljust(console.width - 1)
        console.print(line, end=end, highlight=False, markup=False)

    return show_activity


def _print_line(record: dict, steps: int | None, every: int) -> None:
    step = record["step"]
    if "loss" not in record or step % every == 0 or step in (1, steps):
        of_all = "" if steps is None else f"/{steps}"
        write(f"step {step}{of_all}: {_values(record)}")


def _values(record: dict) -> str:
    values = {name: value for name, value in record.items() if name != "step"}
    return "  ".join(f"{name} {format_value(value)}" for name, value in values.items())
