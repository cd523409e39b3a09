"""Notice that the code of a search has changed since its results were stored."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nas.ask_tell.limits import Limit
from nas.errors import MismatchError
from nas.fingerprints.fingerprint import Fingerprint, fingerprint
from nas.spaces import space as spaces
from nas.spaces.space import Space
from nas.storage.reader import Study
from nas.storage.writer import Store

SHOWN = 4  # changes in a message
REMEDIES = {
    "evaluate": "if they are, resume with other_evaluator=True, or by resume(evaluate=...)",
    "limits": "if they are, resume with other_evaluator=True",
    "space": "if both propose from the same architectures, resume with other_space=True, after "
    "which nas.replay may not follow the run",
}
"""List what may be fingerprinted, and how to resume with other code of it."""

Code = Mapping[str, Fingerprint]


def code_of(space: Space[Any], limits: Sequence[Limit], evaluate: Any = None) -> Code:
    """Return the fingerprints of what a search runs; without an evaluator, of the rest."""
    code = {"space": fingerprint(space, "space")}
    if limits:
        measures = {limit.name: limit.measure for limit in limits}
        code["limits"] = fingerprint(measures, "limits")
    return code if evaluate is None else {**code, "evaluate": fingerprint(evaluate, "evaluate")}


def built_in_space(study: Study) -> Space[Any] | None:
    """Return the built-in space of a run; None if the space is the user's own, or unknown."""
    stored = (study.code or {}).get("space")  # an own space may have the name of a built-in one
    is_own = stored is not None and "space.members" in Fingerprint.from_json(stored).values
    return None if is_own else spaces.named(study.space)


def check(store: Store, code: Code, other: Collection[str] = ()) -> list[str]:
    """Return the changes of code, if these may be, or if nothing is stored that depends on them.

    Args:
        store: The run's store.
        code: The present code.
        other: Whose code may be another one.

    Raises:
        MismatchError: Results of the old code are in the store.
    """
    stored, counts = store.study().code or {}, store.counts()
    measured = counts.results + counts.rejected
    dependent = {"evaluate": counts.results, "limits": measured, "space": counts.proposed}
    changes: list[str] = []
    for name, now in code.items():
        if name not in stored:
            continue
        found = Fingerprint.from_json(stored[name]).changes(now)
        depends = dependent[name]
        if found and depends and name not in other:
            more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            noun = "results" if name == "evaluate" else "candidates"
            raise MismatchError(
                f"{store.path} holds {depends} {noun}, but since then "
                f"{'; '.join(found[:SHOWN])}{more}: old and new results may not be comparable; use "
                f"another name; or, {REMEDIES[name]}"
            )
        changes += found
    return changes
