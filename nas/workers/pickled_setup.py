"""What a run needs to be resumed, and is not data but code: kept pickled in its store."""

import pickle
from typing import Any, NamedTuple

from nas.ask_tell.limits import Limit
from nas.storage.reader import Reader
from nas.workers import task


class Setup(NamedTuple):
    """The arguments of `nas.search` that the store's tables do not have."""

    space: Any
    evaluate: Any
    limits: tuple[Limit, ...]
    options: dict[str, Any]

    def pickled(self) -> bytes | None:
        """For the store; None if it cannot be."""
        simple = {k: v for k, v in self.options.items() if k != "workers" or type(v) in (int, str)}
        try:
            return task.dumps(self._replace(options=simple))
        except Exception:  # of any object's own pickling
            return None


def load_setup(reader: Reader, *, needed: bool = True) -> Setup:
    """The run's own setup; ValueError if it is needed and not to be had. Runs what is pickled."""
    blob = reader.setup()
    try:
        if blob is None:
            raise ValueError("they cannot be pickled")
        return pickle.loads(blob)
    except Exception as error:
        if not needed:
            return Setup(None, None, (), {})
        raise ValueError(
            f"{reader.path} does not have the search's functions ({error}): give the evaluator "
            "anew, resume(evaluate=...), or call nas.search as before, with the same name"
        ) from error
