"""Store and load what a run needs to be resumed and is code: space, evaluator and limits."""

import io
import pickle
from typing import Any, NamedTuple

from gpipe_jax.config import trusted_code
from nas.ask_tell.limits import Limit
from nas.storage import old_names
from nas.storage.reader import Reader
from nas.workers import task


class Setup(NamedTuple):
    """Hold the arguments of `nas.search` that are in no table of the store."""

    space: Any
    evaluate: Any
    limits: tuple[Limit, ...]
    options: dict[str, Any]

    def pickled(self) -> bytes | None:
        """Pickle the setup for the store, and note that it is this user's own.

        Returns:
            The pickle; None if that is not possible.
        """
        simple = {k: v for k, v in self.options.items() if k != "workers" or type(v) in (int, str)}
        try:
            pickled = task.dumps(self._replace(options=simple))
        except Exception:  # any object's own pickling may raise anything
            return None
        trusted_code.remember(pickled)
        return pickled


def load_setup(reader: Reader, *, needed: bool = True) -> Setup:
    """Return the setup that was stored with a run. Unpickling runs code of the run.

    Args:
        reader: The run's store.
        needed: Whether to raise ValueError if there is no setup, instead of returning an empty one.

    Raises:
        ValueError: The setup could not be pickled, or cannot be unpickled here.
    """
    pickled = reader.setup()
    try:
        if pickled is None:
            raise ValueError("they cannot be pickled")
        return _Unpickler(io.BytesIO(pickled)).load()
    except Exception as error:  # any object's own unpickling may raise anything
        if not needed:
            return Setup(None, None, (), {})
        raise ValueError(
            f"{reader.path} does not have the search's functions ({error}): give the evaluator "
            "again, resume(evaluate=...), or call nas.search as before, with the same name"
        ) from error


class _Unpickler(pickle.Unpickler):
    """Find classes of versions before 0.2 where they are now."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        return super().find_class(*old_names.current_class(module_name, global_name))
