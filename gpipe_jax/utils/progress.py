"""What a run says while it goes on: a bar on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gpipe_jax.utils.text import format_value

Show = Callable[[dict], None]


@contextlib.contextmanager
def show(
    steps: int, every: int, console: Console | None = None, *, quiet: bool = False
) -> Iterator[Show]:
    """A function that shows records of a run of `steps` steps; plain lines come `every` steps."""
    if quiet:
        yield lambda record: None
        return
    console = console or Console()
    if not console.is_terminal:
        yield lambda record: _line(record, steps, every)
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
def counting(total: int, noun: str) -> Iterator[Callable]:
    """A function of a number done and a text; plain lines come at every tenth of the total."""
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
    """A function that shows what is going on, on a terminal each time in place of the last."""
    console = console or Console(stderr=True)
    end = "\r" if console.is_terminal else "\n"
    return lambda text: console.print(text.ljust(console.width - 1), end=end, highlight=False)


def _line(record: dict, steps: int, every: int) -> None:
    step = record["step"]
    if "loss" not in record or step % every == 0 or step in (1, steps):
        print(f"step {step}/{steps}: {_values(record)}", flush=True)


def _values(record: dict) -> str:
    named = {k: v for k, v in record.items() if k != "step"}
    return "  ".join(f"{name} {format_value(value)}" for name, value in named.items())


def table(figures: Mapping[str, Any]) -> str:
    """Names and values, one a line."""
    width = max(len(name) for name in figures)
    return "\n".join(f"{name:<{width}}  {format_value(value)}" for name, value in figures.items())
