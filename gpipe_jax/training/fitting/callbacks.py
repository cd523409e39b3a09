"""Call the functions that a user wants to see each record of a training."""

import dataclasses
import json
import traceback
from collections.abc import Callable, Iterable, Sequence

from gpipe_jax.distributed import processes
from gpipe_jax.errors import ArgumentError, SectionError
from gpipe_jax.training.fitting.early_stopping import EarlyStopping

Callback = Callable[[dict], object]


def call(callbacks: Sequence[Callback], record: dict) -> bool:
    """Call each with a copy of the record; return whether any of them stops the training."""
    return any([bool(callback(dict(record))) for callback in callbacks])


def early_stopping(callbacks: Iterable[Callback]) -> list[EarlyStopping]:
    """Return those callbacks that stop early."""
    functions = [c.function if isinstance(c, NamedCallback) else c for c in callbacks]
    return [function for function in functions if isinstance(function, EarlyStopping)]


def replay(callbacks: Sequence[Callback], earlier: Sequence[dict]) -> None:
    """Show the evaluations before a run was interrupted to callbacks that stop early.

    Only the first process has these records, so all processes must call this.
    """
    stops = early_stopping(callbacks)
    if not stops:
        return
    text = json.dumps([record for record in earlier if "test_loss" in record])
    records = json.loads(bytes(processes.broadcast_from_first(list(text.encode()))))
    for stop in stops:
        for record in records:
            stop(record)


@dataclasses.dataclass(frozen=True)
class NamedCallback:
    """Call a function that a config names; an error becomes one of the config.

    Attributes:
        reference: The name in the config, such as "model.py:stop".
        function: The function.
    """

    reference: str
    function: Callback

    def __call__(self, record: dict) -> object:
        """Return what the function returns.

        Raises:
            SectionError: The function raised an error. The message has the line of the code.
        """
        try:
            return self.function(record)
        except ArgumentError as error:
            problem = f"{self.reference}: {error}"
            raise SectionError("train", "callbacks", problem) from error
        except (Exception, SystemExit) as error:
            problem = f"{self.reference} raised {type(error).__name__}: {error}{_place(error)}"
            remedy = "correct it, and run the same command again"
            raise SectionError("train", "callbacks", f"{problem}; {remedy}") from error


def _place(error: BaseException) -> str:
    """Return the last line in the file of the callback, below which the error was raised."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # without the call above
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f", at {own[-1].filename}:{own[-1].lineno}" if own else ""
