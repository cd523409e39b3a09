"""What was meant by a name that is not known."""

import difflib
from collections.abc import Collection
from typing import Any


def nearest(given: Any, names: Collection[str]) -> str | None:
    """The name most like a given text, if one is."""
    if not isinstance(given, str):
        return None
    # Cut, because the comparison takes quadratic time.
    return next(iter(difflib.get_close_matches(given[:80], list(names), n=1)), None)


def did_you_mean(given: Any, names: Collection[str]) -> str:
    """The end of a message: a question if something legal is close, or else nothing."""
    near = nearest(given, names)
    return f"; did you mean {near!r}?" if near else ""


def meant_or_known(given: Any, names: Collection[str]) -> str:
    """The end of a message: a question if something legal is close, or else all that is."""
    return did_you_mean(given, names) or f"; known: {', '.join(names)}"
