"""Create a search's store, or reopen an existing one if it holds the same search."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nas.ask_tell import code_changes
from nas.ask_tell.code_changes import Code
from nas.errors import MismatchError, SearchExistsError
from nas.storage.writer import Store


class Identity(NamedTuple):
    """Hold what two searches must have in common to be the same.

    Attributes:
        space: Name of the space.
        settings: Fields of `nas.Settings`, and `cache`.
        limits: `identity` of each limit.
        code: Fingerprints of what the search runs.
        evaluator: See `nas.evaluators.evaluator.identity_of`; None if it is unknown.
    """

    space: str
    settings: dict[str, Any]
    limits: list[dict[str, Any]]
    code: Code
    evaluator: Mapping[str, Any] | None = None

    def stored(self) -> dict[str, Any]:
        """Return what is stored of it beside the settings."""
        code = {name: each.to_json() for name, each in self.code.items()}
        stored = {"limits": self.limits, "code": code}
        return stored if self.evaluator is None else {**stored, "evaluate": self.evaluator}


def others(*, evaluate: bool, space: bool) -> tuple[str, ...]:
    """Return what may be another one; metrics of limits are compared as fitnesses are."""
    return (("evaluate", "limits") if evaluate else ()) + (("space",) if space else ())


def open_store(
    path: Path,
    name: str,
    identity: Identity,
    setup: bytes | None,
    other: Collection[str] = (),
) -> Store:
    """Open the store at `path` for writing: a new one, or that of the same search.

    A search is the same if its space, settings and limits are equal, and their code. Its evaluator
    must agree too: each value that both identities, the stored and the given one, contain must be
    equal.

    Args:
        path: The run's folder.
        name: The search's name.
        identity: What the search is.
        setup: Space, evaluator and limits, pickled; None if they are unknown.
        other: What may be another one: evaluate, limits, space.

    Raises:
        MismatchError: The store holds another search.
    """
    stored = {**identity.settings, **identity.stored()}
    try:
        return Store.create(path, name=name, space=identity.space, settings=stored, setup=setup)
    except SearchExistsError:
        store = Store(path)
    try:
        _check_settings(store, identity.space, identity.settings)
        _check_limits(store, identity.limits)
        if identity.evaluator is not None and "evaluate" not in other:
            _check_evaluator(store, identity.evaluator)
        changes = code_changes.check(store, identity.code, other)
        _update(store, identity, setup, changes)
    except BaseException:
        store.close()
        raise
    return store


def _update(store: Store, identity: Identity, setup: bytes | None, changes: list[str]) -> None:
    """Store what may have changed since the last driver."""
    if setup is not None:
        store.set_setup(setup)
    evaluator = identity.evaluator
    if changes or (evaluator is not None and store.study().evaluator not in (None, evaluator)):
        store.forget_failures()
    if changes:
        with store.change("changed", detail="; ".join(changes)):
            pass
    store.set_identity(identity.stored())


def _check_settings(store: Store, space: str, settings: dict[str, Any]) -> None:
    study = store.study()
    stored = {"space": study.space, **study.settings}
    given = {"space": space, **settings}
    differences = _differences(stored, given, given | stored)
    if differences:
        raise MismatchError(
            f"{store.path} holds a search with other settings: {differences}; "
            "use another name, or the same settings"
        )


def _check_limits(store: Store, limits: list[dict[str, Any]]) -> None:
    stored = store.study().limits
    if stored is not None and stored != limits:
        raise MismatchError(
            f"{store.path} holds a search with other limits: {_listed(stored)} in the run, "
            f"{_listed(limits)} here; use another name, or the same limits"
        )


def _listed(limits: list[dict[str, Any]]) -> str:
    return "; ".join(", ".join(f"{k} {v}" for k, v in each.items()) for each in limits) or "none"


def _check_evaluator(store: Store, evaluator: Mapping[str, Any]) -> None:
    stored, given = dict(_flat(store.study().evaluator or {})), dict(_flat(evaluator))
    differences = _differences(stored, given, [name for name in given if name in stored])
    if differences:
        raise MismatchError(
            f"{store.path} holds a search with another evaluator, and the fitnesses of the two "
            f"cannot be compared: {differences}; use another name, or the same evaluator; or "
            f"resume with this one by nas.load({str(store.path.parent)!r}).resume(evaluate=...)"
        )


def _differences(stored: Mapping[str, Any], given: Mapping[str, Any], names: Any) -> str:
    """Describe the differences of two dicts in the values of `names`."""
    return "; ".join(
        f"{name} is {stored.get(name)!r} in the run, {given.get(name)!r} here"
        for name in names
        if stored.get(name) != given.get(name)
    )


def _flat(values: Mapping[str, Any], prefix: str = "evaluate.") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dicts with names such as `evaluate.evaluator.epochs`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
