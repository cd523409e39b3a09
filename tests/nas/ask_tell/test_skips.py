"""Go on after an error of the space: the proposal is skipped, and the next one draws anew."""

import warnings

import pytest
from searches import Bits, drive, ones, small

import nas
from nas.reports.report import report

pytestmark = pytest.mark.filterwarnings("ignore:proposal .* is skipped:RuntimeWarning")


class Faulty(Bits):
    """Raise for some architectures in one of its methods."""

    def __init__(self, method: str) -> None:
        self.method = method

    def _check(self, method: str, bits) -> None:
        if method == self.method and tuple(bits[:2]) == (0, 1):
            raise ZeroDivisionError(f"in {method}")

    def random(self, rng):
        bits = super().random(rng)
        self._check("random", bits)
        return bits

    def mutate(self, bits, rng):
        child, words = super().mutate(bits, rng)
        self._check("mutate", child)
        return child, words

    def canonical(self, bits):
        self._check("canonical", bits)
        return Bits().canonical(bits)

    def encode(self, bits):
        self._check("encode", bits)
        return super().encode(bits)


@pytest.mark.parametrize("policy", ["stored", "retrain_scratch"])
@pytest.mark.parametrize("method", ["random", "mutate", "canonical", "encode"])
def test_an_error_of_the_space_skips_a_proposal(tmp_path, method, policy) -> None:
    options = {"space": Faulty(method), "fitness_policy": policy, "cycles": 30, "population": 16}
    with small(tmp_path, **options) as search:
        drive(search)
        assert search.store.counts().results == 30
        skips = [event for event in search.store.events() if event.kind == "skip"]
        wanted = f"{method} of the space raised ZeroDivisionError: in {method}"
        assert skips and {event.detail for event in skips} == {wanted}
        numbers = {row.id for row in search.store.candidates()}
        assert not numbers & {event.candidate for event in skips}
        shown = report(search.store).failures[-1]
        assert shown == ("skipped proposal", len(skips), wanted)
        nas.replay(search.store, options["space"])
    with small(tmp_path, **{**options, "cycles": 40}) as search:
        assert drive(search).store.counts().results == 40


def test_a_skipped_proposal_warns(tmp_path) -> None:
    message = "proposal .* is skipped: random of the space raised ZeroDivisionError: in random"
    with (
        small(tmp_path, space=Faulty("random")) as search,
        warnings.catch_warnings(),
        pytest.warns(RuntimeWarning, match=message),
    ):
        drive(search)


def test_a_space_that_always_raises_ends_the_search_and_it_resumes(tmp_path) -> None:
    class Broken(Bits):
        def mutate(self, bits, rng):
            raise KeyError("op")

    message = (
        r"4 proposals have failed in a row \(max_failures\); the last was proposal 11: mutate of "
        r"the space raised KeyError: 'op'"
    )
    with small(tmp_path, space=Broken(), max_failures=4) as search:
        with pytest.raises(nas.FailuresError, match=message):
            drive(search)
        assert search.store.counts().results == 8
    with small(tmp_path, max_failures=4, other_space=True) as search:
        assert drive(search).store.counts().results == 60
        nas.replay(search.store, Bits())


def test_the_driver_goes_on_too(tmp_path) -> None:
    options = {"population": 8, "sample": 3, "cycles": 40, "workers": 2}
    result = nas.search(space=Faulty("mutate"), evaluate=ones, folder=tmp_path, **options)
    assert result.counts.results == 40
