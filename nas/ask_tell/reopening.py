"""Whether a search may start, or go on in the file that is there."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nas.errors import MismatchError, SearchExistsError
from nas.evolution.evolution import Settings
from nas.spaces.space import Space
from nas.storage.writer import Store


def check_arguments(settings: Settings, cycles: int, cache: bool | int, max_failures: int) -> None:
    """Raise ValueError for what cannot be; `Settings` has checked itself."""
    if isinstance(cycles, bool) or not isinstance(cycles, int) or cycles < 1:
        raise ValueError(f"cycles {cycles!r}: expected a whole number of at least 1")
    if cycles < settings.population and settings.algorithm != "random":
        raise ValueError(
            f"cycles {cycles!r} is less than population {settings.population}: evolution begins "
            "when there are so many results; give more cycles, or a smaller population"
        )
    if not isinstance(cache, int) or cache < 0:
        raise ValueError(
            f"cache {cache!r}: expected True, False, or how many times an architecture is "
            "evaluated before the mean answers"
        )
    if not isinstance(max_failures, int) or max_failures < 1:
        raise ValueError(f"max_failures {max_failures!r}: expected a whole number of at least 1")


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
    """The store at `path`, new, or of the same search; MismatchError if not.

    It is one of the same settings and limits, and of the same evaluator by all that is known of
    both (see `nas.evaluators.evaluator.goes_by`), unless it may be another.
    """
    given = {"limits": limits, **({} if evaluator is None else {"evaluate": evaluator})}
    named = {"name": name, "space": space.name, "setup": setup}
    try:
        return Store.create(path, settings={**settings, **given}, **named)
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
        store.set_evaluator(evaluator)
    return store


def _check_settings(store: Store, space: str, settings: dict[str, Any]) -> None:
    study = store.study()
    there = {"space": study.space, **study.settings}
    here = {"space": space, **settings}
    lines = [_line(name, there.get(name), here.get(name)) for name in here | there]
    if any(lines):
        raise MismatchError(
            f"{store.path} holds a search with other settings: {'; '.join(filter(None, lines))}; "
            "use another name, or the same settings"
        )


def _check_limits(store: Store, limits: list[dict[str, Any]]) -> None:
    there = store.study().limits
    if there is not None and there != limits:
        raise MismatchError(
            f"{store.path} holds a search with other limits: {_listed(there)} there, "
            f"{_listed(limits)} here; use another name, or the same limits"
        )


def _listed(limits: list[dict[str, Any]]) -> str:
    return "; ".join(", ".join(f"{k} {v}" for k, v in one.items()) for one in limits) or "none"


def _check_evaluator(store: Store, evaluator: Mapping[str, Any]) -> None:
    there, here = dict(_flat(store.study().evaluator or {})), dict(_flat(evaluator))
    lines = [_line(name, there[name], here[name]) for name in here if name in there]
    if any(lines):
        raise MismatchError(
            f"{store.path} holds a search by another evaluator, with whose fitnesses this one's "
            f"cannot be compared: {'; '.join(filter(None, lines))}; use another name, or the same "
            f"evaluator; or go on all the same by "
            f"nas.load({str(store.path.parent)!r}).resume(evaluate=...)"
        )


def _line(name: str, there: Any, here: Any) -> str:
    return "" if there == here else f"{name} is {there!r} there, {here!r} here"


def _flat(values: Mapping[str, Any], prefix: str = "evaluate.") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
