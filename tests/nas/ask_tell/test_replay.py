"""Kill drivers at any event, and resume as if nothing had happened."""

import random
import signal
import subprocess
import sys
import time

import pytest
from paths import HELPERS
from searches import Bits, drive, ones, population, small, trace

import nas
from nas.errors import MismatchError, ReplayError
from nas.storage.reader import Reader
from nas.storage.writer import Store

pytestmark = pytest.mark.filterwarnings("ignore:proposal .* is skipped:RuntimeWarning")


class Faulty(Bits):
    """Raise for some mutations."""

    def mutate(self, bits, rng):
        child, words = super().mutate(bits, rng)
        if child[:2] == (0, 1):
            raise ZeroDivisionError
        return child, words


KINDS = {
    "plain": {},
    "cached": {"cache": True},
    "noisy": {"cache": 2},
    "retrained": {"fitness_policy": "retrain_warm", "cycles": 30},
    "non-aging": {"algorithm": "non_aging"},
    "failing": {"retries": nas.Retries(nan=1), "max_failures": 99, "cache": True},
    "failing again": {"fitness_policy": "retrain_scratch", "cycles": 30, "max_failures": 99},
    "limited": {"limits": [nas.Limit("ones", ones, 6)], "cache": True},
    "limited, no cache": {"limits": [nas.Limit("ones", ones, 6)]},
    "skipping": {"space": Faulty(), "max_failures": 99, "cycles": 30,
                 "fitness_policy": "retrain_warm"},
}  # fmt: skip


class KilledError(BaseException):
    """End the driver."""


def evaluate(job: nas.Job) -> dict:
    """Return a noisy fitness, or a failure, that depends on the job alone."""
    fitness = ones(job.architecture) + job.seed % 7 / 10
    failed = job.seed % 5 == 0
    return {"fitness": float("nan") if failed else fitness, "trained_values": str(job.seed)}


def killed_and_resumed(monkeypatch, folder, at: int, slots: int, options: dict) -> nas.Search:
    """Run a search whose driver ends right after event number `at`, and resume it."""
    change = Store.change

    def stopping(store, *arguments, **named):
        if store._seq >= at:
            raise KilledError
        return change(store, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "change", stopping)
        search = None
        try:
            search = small(folder, **options)
            drive(search, evaluate, slots)
        except KilledError:
            pass
        if search is not None:
            search.close()
    return drive(small(folder, **options), evaluate, slots)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [1, 4])
def test_killed_at_any_event_and_resumed(tmp_path, monkeypatch, kind, slots) -> None:
    """Compare proposals, results and population with an uninterrupted search, in 60 cases."""
    whole = drive(small(tmp_path / "whole", **KINDS[kind]), evaluate, slots)
    events = sum(1 for _ in whole.store.events())
    for at in random.Random(f"{kind} {slots}").sample(range(2, events), 5):
        resumed = killed_and_resumed(monkeypatch, tmp_path / str(at), at, slots, KINDS[kind])
        assert trace(resumed) == trace(whole), at
        assert population(resumed) == population(whole), at
        nas.replay(resumed.store, Bits())
        resumed.close()
    whole.close()


DRIVER = """
import sys, time
sys.path[:0] = {tests!r}
import nas
from searches import Bits, ones

def evaluate(bits):
    time.sleep(0.002)
    return ones(bits)

if __name__ == "__main__":
    nas.search(space=Bits(), evaluate=evaluate, folder={folder!r}, population=8, sample=3,
               cycles=150, workers={workers}, cache={cache})
"""


def start(tmp_path, workers: int, cache: bool) -> subprocess.Popen:
    code = DRIVER.format(
        tests=[str(path) for path in HELPERS], folder=str(tmp_path), workers=workers, cache=cache
    )
    return subprocess.Popen([sys.executable, "-c", code])


def events(tmp_path) -> int:
    try:
        return sum(1 for _ in Reader(tmp_path / "search").events())
    except Exception:  # the file is missing, or not complete yet
        return 0


@pytest.mark.parametrize(("workers", "cache"), [(1, True), (4, False)])
def test_killed_by_sigkill_repeatedly(tmp_path, workers, cache) -> None:
    """Lose nothing and count nothing twice; with one worker everything is as without a kill."""
    rng, kills = random.Random(workers), 0
    while True:
        process, before = start(tmp_path, workers, cache), events(tmp_path)
        more = rng.randrange(40, 120)
        while process.poll() is None and events(tmp_path) < before + more:
            time.sleep(0.005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 2
    reader = Reader(tmp_path / "search")
    counts = reader.counts()
    assert counts.results == 150 and counts.proposed == 150 and len(reader.population()) == 8
    assert all(reader.attempts(n, None, "ok") <= 1 for n in range(150))
    assert counts.evaluations + counts.cache_hits == 150
    nas.replay(reader, Bits())
    if workers == 1:
        with small(tmp_path / "whole", cycles=150, cache=cache) as whole:
            drive(whole)
            rows = [(row.id, row.architecture, row.parent, row.fitness) for row in
                    reader.candidates()]  # fmt: skip
            assert rows == [(r[0], r[1], r[2], r[5]) for r in trace(whole)]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE candidates SET architecture = '111111111111' WHERE id = 20", "candidate 20: "),
        ("UPDATE candidates SET parent = 1 WHERE id = 30", "candidate 30: "),
        ("UPDATE candidates SET canonical = 'x' WHERE id = 30", "digest of candidate 30's canonic"),
        ("UPDATE candidates SET removed = NULL WHERE id = 3", "population: "),
        ("UPDATE candidates SET removed = 9 WHERE id = 59", "population: "),
        ("UPDATE events SET fitness = 0 WHERE kind = 'result'", r"candidate \d+: "),
    ],
)
def test_a_wrong_log_is_detected(tmp_path, statement, message) -> None:
    with small(tmp_path) as search:
        drive(search)
        search.store._connection.execute(statement)
        with pytest.raises(ReplayError, match=f"{message}.* in the store, .* by the log"):
            nas.replay(search.store, Bits())


def test_another_space_is_refused(tmp_path) -> None:
    """Compare names, and then the canonical forms, which no proposal shows."""

    class Renamed(Bits):
        """Propose the same under another name."""

        name = "rotated bits"

    class Plain(Bits):
        """Propose the same, without duplicates."""

        canonical = Bits.encode

    with small(tmp_path) as search:
        drive(search)
        with pytest.raises(MismatchError, match="the space 'bits', but the given one is 'rotated"):
            nas.replay(search.store, Renamed())
        with pytest.raises(ReplayError, match=r"canonical form: \w+ in the store, \w+ by the log"):
            nas.replay(search.store, Plain())
