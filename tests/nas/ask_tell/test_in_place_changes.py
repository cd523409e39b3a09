"""Change architectures in place, wherever code of a user's gets one: fitnesses stay where they are.

Each row's fitness must be that of its own text, and the run must replay.
"""

import pytest
from searches import Bits, drive, small

import nas


class Lists(Bits):
    """Search lists; `mutate` changes its argument."""

    name = "lists"

    def random(self, rng):
        return list(super().random(rng))

    def mutate(self, bits, rng):
        i = rng.randrange(self.length)
        bits[i] = 1 - bits[i]
        return bits, f"flip: bit {i}"

    def decode(self, text):
        return list(super().decode(text))


class Buffer(Lists):
    """Return the same list each time."""

    def __init__(self) -> None:
        self.buffer = [0] * self.length

    def random(self, rng):
        self.buffer[:] = super().random(rng)
        return self.buffer

    def mutate(self, bits, rng):
        self.buffer[:], words = super().mutate(bits, rng)
        return self.buffer, words


class Cleared(Lists):
    """Change the argument in the functions that only read."""

    def canonical(self, bits):
        text = super().encode(bits)
        bits.clear()
        return text

    encode = canonical


def count_and_clear(bits) -> float:
    """Return the fitness, and leave nothing."""
    fitness = float(sum(bits))
    bits.clear()
    return fitness


SPACES = {kind.__name__: kind for kind in (Lists, Buffer, Cleared)}


@pytest.mark.parametrize("kind", SPACES)
def test_each_fitness_belongs_to_its_own_architecture(tmp_path, kind) -> None:
    space = SPACES[kind]()
    limits = [nas.Limit(name, count_and_clear) for name in ("ones", "again")]
    result = nas.search(
        space=space, evaluate=nas.Repeated(count_and_clear, 2), folder=tmp_path, population=8,
        sample=3, cycles=60, workers=4, limits=limits,
    )  # fmt: skip
    rows = list(result.reader.candidates())
    assert len(rows) == 60
    assert all(row.fitness == row.architecture.count("1") for row in rows)
    assert all(row.fitness == row.metrics["ones"] == row.metrics["again"] for row in rows)
    nas.replay(result.reader, space)


def test_a_retry_gets_the_architecture_as_it_was(tmp_path) -> None:
    def fail_once(job) -> float:
        ones = float(sum(job.architecture))
        job.architecture[:] = [0] * 12
        return float("nan") if job.attempt == 1 else ones

    options = {"space": Lists(), "retries": nas.Retries(nan=1), "max_failures": 99, "cycles": 12}
    with small(tmp_path, **options) as search:
        drive(search, fail_once)
        rows = list(search.store.candidates())
    assert all(row.fitness == row.architecture.count("1") for row in rows)
