"""Two runs in one folder without locks: one of them ends with a clear error, and data stays."""

import threading
import time

import pytest
from etils import epath

from gpipe_jax.errors import RunInUseError
from gpipe_jax.run_folder import claim as claims
from gpipe_jax.run_folder.claim import Claim, claimed


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(claims, "RENEW_S", 0.02)
    monkeypatch.setattr(claims, "LEASE_S", 0.3)
    monkeypatch.setattr(claims, "SETTLE_S", 0.01)


@pytest.fixture
def path(tmp_path) -> epath.Path:
    return epath.Path(tmp_path / "lock")


def test_a_claim_is_renewed_and_removed_at_the_end(path):
    with claimed(path) as claim:
        first = path.read_text()
        time.sleep(0.1)
        assert path.read_text() != first and path.read_text()[:16] == first[:16]
        claim.check()
    assert not path.exists() and not claim._thread.is_alive()


def test_a_folder_whose_run_is_alive_is_refused(path, capsys):
    with claimed(path):
        with pytest.raises(RunInUseError, match=r"another run is using .*\(see .*lock\); end"):
            Claim(path).take()
        assert "belongs to a run that was killed or is still working" in capsys.readouterr().err
        assert path.exists(), "that of the run that is alive"


def test_a_claim_of_a_run_that_died_is_taken_after_a_while(path):
    path.write_text("the token of a run that was killed")
    begun = time.monotonic()
    with claimed(path) as claim:
        assert time.monotonic() - begun > claims.LEASE_S
        claim.check()


def test_a_run_that_ends_while_another_waits(path):
    path.write_text("another")
    timer = threading.Timer(0.05, path.unlink)
    timer.start()
    with claimed(path):
        timer.join()


def test_the_run_whose_claim_is_taken_ends_and_leaves_it(path):
    with claimed(path) as claim:
        path.write_text("another")
        time.sleep(0.1)
        assert path.read_text() == "another", "it is not replaced"
        with pytest.raises(RunInUseError, match="another run is using"):
            claim.check()
    assert path.read_text() == "another", "nor removed"


def test_two_runs_that_begin_at_once_do_not_both_go_on(path, monkeypatch):
    monkeypatch.setattr(claims, "SETTLE_S", 0.2)
    barrier, outcomes = threading.Barrier(2), []

    def begin() -> None:
        claim = Claim(path)
        barrier.wait()
        try:
            claim.take()
            outcomes.append("takes")
        except RunInUseError:
            outcomes.append("refused")

    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "takes"]


def test_someone_removes_the_object(path):
    with claimed(path) as claim:
        path.unlink()
        claim.check()
        time.sleep(0.1)
        assert path.exists(), "it is renewed"


def test_a_network_that_fails_ends_nothing(path, monkeypatch):
    with claimed(path) as claim:

        def fails(_):
            raise ConnectionError("503")

        with monkeypatch.context() as patch:
            patch.setattr(claims, "_read", fails)
            claim.check()
            time.sleep(0.1)
        before = path.read_text()
        time.sleep(0.1)
        assert path.read_text() != before, "it is renewed again"
