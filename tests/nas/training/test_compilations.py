"""Check that with the interpreter a search compiles each program once, whatever it proposes."""

import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from toy import SMALL_SPACE, search, small

from nas import errors
from nas.training import compilation_cache as cache
from nas.training import programs

EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled(monkeypatch):
    """Count the programs that XLA compiles, by name."""
    monkeypatch.setattr(cache, "use", lambda folder: None)
    counts: Counter[str] = Counter()

    def listener(name: str, _: float, **details) -> None:
        if name == EVENT:
            counts[details.get("fun_name")] += 1

    jax.monitoring.register_event_duration_secs_listener(listener)
    yield counts
    jax.monitoring.unregister_event_duration_listener(listener)


def test_a_search_compiles_each_program_once(tmp_path, compiled) -> None:
    options = {"space": SMALL_SPACE, "population": 4, "sample": 2}
    result = search(tmp_path, small(), cycles=12, **options)
    before = result.counts.evaluations
    assert before >= 8
    more = search(tmp_path, small(), cycles=20, **options)
    assert more.counts.evaluations > before
    assert compiled == {"jit(start)": 1, "jit(epoch)": 1, "jit(validate)": 1}
    first, *rest = [row.metrics["compile_s"] for row in more.reader.evaluations()]
    assert first > 0 and not any(rest)


def test_disk_cache_works_after_earlier_compilations(tmp_path) -> None:
    jax.jit(lambda x: x - 1)(3.0)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[1], 0.0)
    try:
        cache.use(str(tmp_path))
        jax.jit(lambda x: x * 17 + 4)(3.0)
        assert list(tmp_path.iterdir())
        jax.config.update(names[0], str(tmp_path / "mine"))
        for folder, expected in ((None, "mine"), ("a", "a"), ("b", "b"), (None, "mine")):
            cache.use(folder and str(tmp_path / folder))
            assert getattr(jax.config, names[0]) == str(tmp_path / expected)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def programs_of(network: Any, architecture: Any = ()) -> tuple[Any, bool]:
    """Replace compilation, so that the cache holds networks."""
    recipe: Any = None
    return programs.get(network, recipe, architecture, recipe)


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """Programs are their network, and two are kept."""
    monkeypatch.setattr(programs, "_compile", lambda network, *_: network)
    monkeypatch.setattr(programs, "_programs", {})
    monkeypatch.setattr(programs, "MAX_KEPT", 2)


def test_the_programs_used_least_recently_go(uncompiled) -> None:
    compiled = [programs_of(name)[1] for name in ("a", "b", "a", "c", "a", "b")]
    assert compiled == [True, True, False, True, False, True]


def test_programs_belong_to_the_settings_of_jax(uncompiled) -> None:
    assert programs_of("a")[1]
    for other in (jax.enable_x64(True), jax.default_matmul_precision("highest")):
        with other:
            assert [programs_of("a")[1] for _ in range(2)] == [True, False]
        assert not programs_of("a")[1]


def test_programs_are_kept_for_however_many_devices(uncompiled, monkeypatch) -> None:
    def on_each(network: str) -> list[bool]:
        are_new = []
        for number in range(4):
            monkeypatch.setattr(programs, "this_device", lambda number=number: number)
            are_new.append(programs_of(network)[1] > 0)
        return are_new

    assert all(on_each("a")) and all(on_each("b")) and not any(on_each("a"))
    assert all(on_each("c")) and not any(on_each("a")) and all(on_each("b"))


def test_no_program_waits_for_the_compilation_of_another(uncompiled, monkeypatch) -> None:
    def compiled(network, *rest) -> Any:
        if network == "slow":
            begun.set()
            end.wait(30)
        return network

    begun, end = threading.Event(), threading.Event()
    monkeypatch.setattr(programs, "_compile", compiled)
    programs_of("ready")
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(programs_of, "slow")
        assert begun.wait(10)
        try:
            assert pool.submit(programs_of, "ready").result(5) == ("ready", False)
            for other in range(200):
                assert pool.submit(programs_of, other).result(5) == (other, True)
        finally:
            end.set()
        assert slow.result(10)[0] == "slow"


def test_what_is_too_large_is_compiled_but_once(uncompiled, monkeypatch) -> None:
    def compiled(*network) -> None:
        count.append(network)
        raise errors.TooLargeError("training needs 9 GiB")

    count: list[tuple] = []
    monkeypatch.setattr(programs, "_compile", compiled)
    for _ in range(3):
        with pytest.raises(MemoryError, match="training needs 9 GiB"):
            programs_of("large", np.zeros(3))
    assert len(count) == 1


def test_threads_that_need_different_programs(uncompiled) -> None:
    """Compile different programs at once: additions and removals by others do no harm."""
    names = [f"{n % 7}" for n in range(3_000)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert [compiled for compiled, _ in pool.map(programs_of, names)] == names
    finally:
        sys.setswitchinterval(before)
    assert len(programs._programs) == 2


def test_the_default_folder(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache.default_folder() == Path("/caches/gpipe-jax/jax")
