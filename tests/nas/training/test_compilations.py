"""With the interpreter a search compiles as often as there are programs, whatever it proposes."""

from collections import Counter
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from toy import SMALL_SPACE, search, small

from nas.training import cache

EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compiled(monkeypatch):
    """A count of the programs that XLA compiles, by name."""
    monkeypatch.setattr(cache, "use", lambda folder: None)
    found: Counter[str] = Counter()
    listener = lambda name, _, **about: name == EVENT and found.update([about.get("fun_name")])  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield found
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


def test_programs_are_kept_on_disk_also_if_something_was_compiled_before(tmp_path) -> None:
    jax.jit(lambda x: x - 1)(3.0)
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[1], 0.0)
    try:
        cache.use(str(tmp_path))
        jax.jit(lambda x: x * 17 + 4)(3.0)
        assert list(tmp_path.iterdir())
        cache.use()
        assert getattr(jax.config, names[0]) == str(tmp_path)  # as JAX was told
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_the_default_folder(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache.default() == Path("/caches/gpipe-jax/jax")
