"""Whether a search may start, or go on in the file that is there."""

from pathlib import Path
from typing import Any

from nas.evolution import Settings
from nas.space import Space
from nas.store import ExistsError, Store


class MismatchError(ValueError):
    """The file holds a search with other settings."""


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
    path: Path, name: str, space: Space[Any], settings: dict[str, Any], setup: bytes | None
) -> Store:
    """The store at `path`, new, or of a search with the same settings; MismatchError if not."""
    try:
        return Store.create(path, name=name, space=space.name, settings=settings, setup=setup)
    except ExistsError:
        store = Store(path)
    try:
        _check_same(store, space.name, settings)
    except BaseException:
        store.close()
        raise
    if setup is not None:
        store.set_setup(setup)
    return store


def _check_same(store: Store, space: str, settings: dict[str, Any]) -> None:
    study = store.study()
    there = {"space": study.space, **study.settings}
    here = {"space": space, **settings}
    lines = [
        f"{name} is {there.get(name)!r} there, {here.get(name)!r} here"
        for name in here | there
        if there.get(name) != here.get(name)
    ]
    if lines:
        raise MismatchError(
            f"{store.path} holds a search with other settings: {'; '.join(lines)}; use another "
            "name, or the same settings"
        )
