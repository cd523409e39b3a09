"""Store and load what a run needs to be resumed and is code: space, evaluator and limits.

A run's file holds one JSON object: the options as they are, and each part pickled on its own. So a
part whose module is not here, or that is too large, does not take the others with it. Files of
versions before 0.2 hold one pickle of everything.

Unpickling runs code of the run. So it needs trust: either the caller's, or this user has stored the
same on this machine.
"""

import base64
import dataclasses
import io
import json
import pickle
import sys
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from gpipe_jax import known_code
from nas.ask_tell.limits import Limit, Retries
from nas.evaluators.outcomes import describe
from nas.pickles import pickling
from nas.storage import old_names
from nas.storage.reader import Reader

MAX_BYTES = 1_000_000  # of one part; an evaluator may refer to all its data
PARTS = {
    "space": "nas.load(..., space=...)",
    "evaluate": "resume(evaluate=...), or call nas.search as before, with the same name",
    "limits": "resume(limits=...)",
}
"""List the parts that are pickled, and how to give each of them."""


class Setup(NamedTuple):
    """Hold the arguments of `nas.search` that are in no table of the store."""

    space: Any = None
    evaluate: Any = None
    limits: tuple[Limit, ...] = ()
    options: Mapping[str, Any] = {}

    def pickled(self) -> bytes:
        """Return the setup for the store, and note that it is this user's own."""
        parts: dict[str, Any] = {name: _pickled(getattr(self, name)) for name in PARTS}
        stored = json.dumps({"options": _json_values(self.options), **parts}).encode()
        known_code.remember(stored)
        return stored


def load_setup(
    reader: Reader, *, needed: Collection[str] = tuple(PARTS), trust: bool = False
) -> Setup:
    """Return the setup that was stored with a run.

    Args:
        reader: The run's store.
        needed: The parts to unpickle; others are empty. Default: all.
        trust: Whether to run code of the run, also if this user has not stored it. Default: False.

    Raises:
        ValueError: A needed part is not trusted, was not stored, or cannot be unpickled here.
    """
    stored = reader.setup()
    is_trusted = stored is None or trust or known_code.is_known(stored)
    if needed and not is_trusted:
        raise ValueError(
            f"{reader.path} holds code ({', '.join(needed)}) that you have not stored on this "
            f"machine: give {' and '.join(PARTS[name] for name in needed)}; or, if you trust who "
            "made the run, nas.load(..., trust=True), which runs that code"
        )
    if stored is None:
        stored = b"{}"
    if not stored.startswith(b"{"):
        return _load_old(reader, stored) if needed else Setup()
    values = json.loads(stored)
    missing = {"problem": "it was not stored"}
    parts = {name: _unpickled(reader, name, values.get(name, missing)) for name in needed}
    options = dict(values.get("options", {}))
    if not is_trusted and "://" in str(options.get("workers")):
        del options["workers"]  # a stranger's scheduler could run code here
    if isinstance(options.get("retries"), dict):
        options["retries"] = Retries(**options["retries"])
    return Setup(**parts, options=options)


class _TooLargeError(Exception):
    """End a pickling."""


class _BoundedFile(io.BytesIO):
    """Take at most `MAX_BYTES`, so that large data are not copied first."""

    def write(self, data: Any) -> int:
        """Write, or raise _TooLargeError."""
        if self.tell() + memoryview(data).nbytes > MAX_BYTES:
            raise _TooLargeError
        return super().write(data)


def _pickled(value: Any) -> dict[str, str]:
    """Return the pickle of a part, or the problem."""
    file = _BoundedFile()
    try:
        pickling.dump(value, file)
    except _TooLargeError:
        size = f"more than {MAX_BYTES / 1e6:g} MB"
        return {"problem": f"with the data that it refers to, it takes {size}"}
    except Exception as error:  # any object's own pickling may raise anything
        return {"problem": f"it cannot be pickled: {describe(error)}"}
    return {"pickle": base64.b64encode(file.getvalue()).decode()}


def _unpickled(reader: Reader, name: str, part: Mapping[str, str]) -> Any:
    problem, cause = part.get("problem"), None
    if problem is None:
        try:
            return _Unpickler(io.BytesIO(base64.b64decode(part["pickle"]))).load()
        except Exception as error:  # any object's own unpickling may raise anything
            problem, cause = describe(error), error
    raise ValueError(
        f"{reader.path} does not have `{name}` of the search ({problem}): give it again, "
        f"{PARTS[name]}"
    ) from cause


def _load_old(reader: Reader, stored: bytes) -> Setup:
    try:
        return _Unpickler(io.BytesIO(stored)).load()
    except Exception as error:  # any object's own unpickling may raise anything
        raise ValueError(
            f"{reader.path} does not have the search's functions ({describe(error)}): give the "
            f"evaluator again, {PARTS['evaluate']}"
        ) from error


def _json_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that JSON can hold."""
    values = {}
    for name, value in options.items():
        try:
            values[name] = json.loads(json.dumps(value, default=_as_json))
        except (TypeError, ValueError):
            continue
    return values


def _as_json(value: Any) -> Any:
    if isinstance(value, Retries):
        return dataclasses.asdict(value)
    if "numpy" in sys.modules and isinstance(value, sys.modules["numpy"].generic):
        return value.item()
    raise TypeError(f"{value!r} is not a JSON value")


class _Unpickler(pickle.Unpickler):
    """Find classes of versions before 0.2 where they are now."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        return super().find_class(*old_names.current_class(module_name, global_name))
