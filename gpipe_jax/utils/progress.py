"""Show the progress of a command: a bar on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpipe_jax.utils.text import format_value

Show = Callable[[dict], None]


@contextlib.contextmanager
def show(
    steps: int, every: int, console: Console | None = None, *, quiet: bool = False
) -> Iterator[Show]:
    """Yield a function that shows a record of a training run.

    Args:
        steps: Number of steps of the run.
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
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=steps)

        def update(record: dict) -> None:
            if "loss" in record:
                bar.update(task, completed=record["step"], description=_values(record))
            else:
                bar.console.print(f"step {record['step']}: {_values(record)}", highlight=False)

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
                print(f"{done}/{total} {noun}: {text}", flush=True)
                shown = done

        yield line
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, text: bar.update(task, completed=done, description=f"{noun}, {text}")


def passing(console: Console | None = None) -> Callable[[str], None]:
    """Return a function that shows the current activity; on a terminal it replaces the last one.

    Args:
        console: Where to write. Default: standard error.
    """
    console = console or Console(stderr=True)
    end = "\r" if console.is_terminal else "\n"
    return lambda text: console.print(text.ljust(console.width - 1), end=end, highlight=False)


def _print_line(record: dict, steps: int, every: int) -> None:
    step = record["step"]
    if "loss" not in record or step % every == 0 or step in (1, steps):
        print(f"step {step}/{steps}: {_values(record)}", flush=True)


def _values(record: dict) -> str:
    values = {name: value for name, value in record.items() if name != "step"}
    return "  ".join(f"{name} {format_value(value)}" for name, value in values.items())
