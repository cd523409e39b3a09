"""Create a search's store, or reopen an existing one if it holds the same search."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nas.errors import MismatchError, SearchExistsError
from nas.spaces.space import Space
from nas.storage.writer import Store


def open_store(
    path: Path,
    name: str,
    space: Space[Any],
    settings: dict[str, Any],
    limits: list[dict[str, Any]],
    setup: bytes | None,
    evaluator: Mapping[str, Any] | None = None,
    other_evaluator: bool = False,
) -> Store:
    """Open the store at `path` for writing: a new one, or that of the same search.

    A search is the same if its space, settings and limits are equal. Its evaluator must agree too:
    each value that both identities, the stored and the given one, contain must be equal.

    Args:
        path: The run's folder.
        name: The search's name.
        space: Its space.
        settings: Fields of `nas.Settings`, and `cache`.
        limits: `identity` of each limit.
        setup: Space, evaluator and limits, pickled; None if that is not possible.
        evaluator: See `nas.evaluators.evaluator.identity_of`; None if it is unknown.
        other_evaluator: Whether the evaluator may be another one.

    Raises:
        MismatchError: The store holds another search.
    """
    stored = {**settings, "limits": limits}
    if evaluator is not None:
        stored["evaluate"] = evaluator
    try:
        return Store.create(path, name=name, space=space.name, settings=stored, setup=setup)
    except SearchExistsError:
        store = Store(path)
    try:
        _check_settings(store, space.name, settings)
        _check_limits(store, limits)
        if evaluator is not None and not other_evaluator:
            _check_evaluator(store, evaluator)
    except BaseException:
        store.close()
        raise
    if setup is not None:
        store.set_setup(setup)
    if evaluator is not None:
        if store.study().evaluator not in (None, evaluator):
            store.forget_failures()
        store.set_evaluator(evaluator)
    return store


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
