"""With the interpreter a search compiles as often as there are programs, whatever it proposes."""

from collections import Counter

import jax
import pytest
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
    assert result.counts.evaluations >= 8
    more = search(tmp_path, small(), cycles=20, **options)
    assert more.counts.evaluations > result.counts.evaluations
    assert compiled == {"jit(start)": 1, "jit(epoch)": 1, "jit(validate)": 1}
    first, *rest = [row.metrics["compile_s"] for row in more.reader.evaluations()]
    assert first > 0 and not any(rest)
