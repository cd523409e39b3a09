"""TensorBoard and Weights & Biases, beside the metrics file: imported only when asked for."""

import contextlib
import importlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from etils import epath

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


class Writer(Protocol):
    """Something that is told the records that go into the metrics file."""

    def write(self, record: dict) -> None:
        """Show a record: "step", and a number for each other name."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in the folder `tensorboard` of the run."""

    def __init__(self, folder: epath.Path, config: dict, step: int) -> None:
        from tensorboardX import SummaryWriter

        # What was written after the checkpoint that the run continues from is hidden.
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if not step:
            lines = [f"    {section}: {values}" for section, values in config.items()]
            self._writer.add_text("config", "\n".join(lines), 0)

    def write(self, record: dict) -> None:
        """Show a record."""
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Send what is left."""
        self._writer.close()


class Wandb:
    """A run of W&B, which a continued run continues.

    W&B's own settings hold: WANDB_PROJECT, WANDB_MODE=offline, and so on.
    """

    def __init__(self, folder: epath.Path, config: dict, step: int) -> None:
        wandb = importlib.import_module("wandb")
        name = folder / "wandb_id"
        if not name.exists():
            name.write_text(secrets.token_hex(8))
        self._run: Any = wandb.init(
            id=name.read_text(), resume="allow", name=folder.name, dir=str(folder), config=config
        )

    def write(self, record: dict) -> None:
        """Show a record."""
        values = {name: value for name, value in record.items() if name != "step"}
        self._run.log(values, step=record["step"])

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


WRITERS = {"tensorboard": TensorBoard, "wandb": Wandb}


def check(names: Sequence[str]) -> None:
    """Raise ImportError, which says what to install, if a writer's package is missing."""
    for name in names:
        try:
            importlib.import_module(PACKAGES[name])
        except ImportError as error:
            raise ImportError(
                f"`writers`: {name} needs {PACKAGES[name]} ({error}): run "
                f"pip install 'gpipe-jax[{name}]'"
            ) from error


@contextlib.contextmanager
def opened(
    names: Sequence[str], folder: epath.Path, config: dict, step: int
) -> Iterator[list[Writer]]:
    """The writers of a run that continues after `step`; they are closed however it ends."""
    with contextlib.ExitStack() as stack:
        found: list[Writer] = [WRITERS[name](folder, config, step) for name in names]
        for writer in found:
            stack.callback(writer.close)
        yield found
