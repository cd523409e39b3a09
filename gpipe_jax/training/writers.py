"""Write metrics to TensorBoard and Weights & Biases, which are imported only on request."""

import contextlib
import importlib
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from etils import epath

from gpipe_jax.errors import ArgumentError, ConfigError
from gpipe_jax.utils import atomic_files
from gpipe_jax.utils.messages import say
from gpipe_jax.utils.text import install_advice

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Writer(Protocol):
    """Define where else the records of the metrics file are written."""

    def write(self, record: dict) -> None:
        """Write a record: "step", and a number for each other name."""

    def close(self) -> None:
        """Write the buffered lines, and close."""


class TensorBoard:
    """Write event files into the folder `tensorboard` of the run."""

    def __init__(self, folder: epath.Path, config: dict, step: int) -> None:
        from tensorboardX import SummaryWriter

        # Hides what was written after the checkpoint from which the run resumes.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if not step:
            lines = [f"    {section}: {values}" for section, values in config.items()]
            self._writer.add_text("config", "\n".join(lines), 0)

    def write(self, record: dict) -> None:
        """Write a record."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Write the buffered lines, and close."""
        self._writer.close()


class Wandb:
    """Write to a run of W&B; a run that resumes continues it.

    W&B's own settings apply: WANDB_PROJECT, WANDB_MODE=offline, and so on.
    """

    def __init__(self, folder: epath.Path, config: dict, step: int) -> None:
        wandb = importlib.import_module("wandb")
        path = folder / "wandb_id"
        if not path.exists():
            atomic_files.write_text(path, secrets.token_hex(8))
        run_id = path.read_bytes().decode(errors="replace")
        if not re.fullmatch(r"[\w-]{1,64}", run_id):
            raise ValueError(f"{path} holds {run_id[:64]!r}, which is not a run's id; remove it")
        self._run: Any = wandb.init(
            id=run_id, resume="allow", name=folder.name, dir=str(folder), config=config
        )

    def write(self, record: dict) -> None:
        """Write a record."""
        values = {name: value for name, value in record.items() if name != "step"}
        self._run.log(values, step=record["step"])

    def close(self) -> None:
        """Write the buffered lines, and close."""
        self._run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb}


class _Expendable:
    """Wrap a writer: if it fails, the run continues without it. The metrics file is complete."""

    def __init__(self, name: str, writer: Writer) -> None:
        self._name, self._writer, self._failed = name, writer, False

    def write(self, record: dict) -> None:
        self._try(self._writer.write, record)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, action: Callable, *arguments: Any) -> None:
        if self._failed:
            return
        try:
            action(*arguments)
        except Exception as error:  # each package raises its own errors
            self._failed = True
            say(f"{self._name}: {error}; the run continues without it")


def check(names: Sequence[str]) -> None:
    """Raise an ArgumentError that says what to install, if a writer's package is missing."""
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise ArgumentError(
                "writers",
                f"`writers`: {name} needs {PACKAGES[name]} ({error}): {install_advice(name)}",
            ) from error


@contextlib.contextmanager
def opened(
    names: Sequence[str], folder: epath.Path, config: dict, step: int
) -> Iterator[list[Writer]]:
    """Open the writers of a run that resumes after `step`, and close them however it ends.

    If a writer fails later, a message says so, and the run continues without it.

    Raises:
        ConfigError: A writer cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = []
        for name in names:
            writers.append(_opened(name, folder, config, step))
            stack.callback(writers[-1].close)
        yield writers


def _opened(name: str, folder: epath.Path, config: dict, step: int) -> Writer:
    try:
        return _Expendable(name, WRITERS[name](folder, config, step))
    except Exception as error:  # each package raises its own errors
        problem = f"train.writers: {name} cannot be opened ({error}); correct that, or leave it out"
        raise ConfigError([problem], str(folder)) from error
