"""With the interpreter a search compiles as often as there are programs, whatever it proposes."""

from collections import Counter

import jax
import pytest

import nas
from nas.training import cache

SPACE = nas.NASNetSpace(pairs=2, operations=("identity", "sep_3x3", "max_pool_3x3"))
SMALL = nas.TrainingEvaluator(
    filters=2, epochs=2, validations=1, examples=64, batch_size=32, validation=40,
    compilation_cache="never used",
)  # fmt: skip
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


def run(folder, evaluator, cycles: int) -> nas.Result:
    return nas.search(
        space=SPACE, evaluate=evaluator, folder=folder, population=4, sample=2, cycles=cycles
    )


def test_a_search_compiles_each_program_once(tmp_path, compiled) -> None:
    result = run(tmp_path, SMALL, 12)
    assert result.counts.evaluations >= 8
    more = run(tmp_path, SMALL, 20)
    assert more.counts.evaluations > result.counts.evaluations
    assert compiled == {"jit(start)": 1, "jit(epoch)": 1, "jit(validate)": 1}
    first, *rest = [row.metrics["compile_s"] for row in more.reader.evaluations()]
    assert first > 0 and not any(rest)
