"""Propose and remove members by the algorithm, from its inputs alone."""

import random

import pytest
from searches import Bits, ones

from nas.evolution.evolution import Evolution, Member, Settings

# Seed 0, P = 6, S = 3 on `Bits`. If this trace changes, no existing run can be resumed: change the
# schema's version with it.
GOLDEN = """
110110101010 None None
101100101110 None None
001110001000 None None
001101001110 None None
011101011100 None None
110001001100 None None
101100111110 1 flip: bit 7
100100111110 6 flip: bit 2
100100111100 7 flip: bit 10
100100111000 8 flip: bit 9
011101011110 4 flip: bit 10
011101011010 10 flip: bit 9
011101011011 11 flip: bit 11
011101111110 10 flip: bit 6
011001111110 13 flip: bit 3
011101001011 12 flip: bit 7
"""


def run(evolution: Evolution, cycles: int, fitness=ones) -> list[tuple]:
    """Run one candidate at a time, with its number as stamp.

    Return (text, parent, mutation, removed) of each.
    """
    trace = []
    for k in range(cycles):
        _, architecture, parent, mutation, sample = evolution.propose(k)
        removed = evolution.add(Member(k, architecture, fitness(architecture), k), sample)
        text = evolution.space.encode(architecture)
        trace.append((text, parent, mutation, removed and removed.candidate))
    return trace


def small(**settings) -> Evolution:
    return Evolution(Bits(), Settings(**{"population": 6, "sample": 3, **settings}))


def test_the_golden_trace() -> None:
    lines = [f"{text} {parent} {mutation}" for text, parent, mutation, _ in run(small(), 16)]
    assert "\n".join(lines) == GOLDEN.strip()


def test_the_oldest_is_removed_even_if_it_is_the_best() -> None:
    evolution = small()
    best = (1,) * 12
    evolution.add(Member(0, best, 99.0, 0))
    for k in range(1, 6):
        assert evolution.add(Member(k, (0,) * 12, 0.0, k)) is None
    removed = evolution.add(Member(6, (0,) * 12, 0.0, 6))
    assert removed and removed.architecture == best
    assert [m.candidate for m in evolution.members] == [1, 2, 3, 4, 5, 6]


def test_a_long_run_removes_in_order_of_age() -> None:
    assert [row[3] for row in run(small(), 200)] == [None] * 6 + list(range(194))


def test_a_retrained_member_is_young_again() -> None:
    evolution = small()
    run(evolution, 6)
    assert evolution.refresh(0, 3.5, 6) == Member(0, evolution.members[-1].architecture, 3.5, 6)
    assert evolution.results == 6 and len(evolution.members) == 6
    removed = evolution.add(Member(7, (0,) * 12, 0.0, 7))
    assert removed and removed.candidate == 1
    assert evolution.refresh(1, 9.0, 8) is None  # it has left


def test_stamps_increase() -> None:
    evolution = small()
    run(evolution, 3)
    with pytest.raises(ValueError, match="last_trained 2 is not after 2, the newest member's"):
        evolution.add(Member(3, (0,) * 12, 0.0, 2))


def test_evolution_begins_after_p_results_not_proposals() -> None:
    evolution = small()
    assert all(evolution.propose(k).parent is None for k in range(50))
    run(evolution, 5)
    assert evolution.propose(50).parent is None
    evolution.add(Member(60, (0,) * 12, 0.0, 60))
    assert evolution.propose(50).parent is not None


def test_a_proposal_depends_on_number_and_population_alone() -> None:
    first, second = small(), small()
    run(first, 30), run(second, 30)
    ahead = [first.propose(k) for k in (40, 30, 35)]
    random.seed(7)
    assert ahead == [second.propose(k) for k in (40, 30, 35)]
    assert first.propose(30) != first.propose(31)
    assert small(seed=1).propose(0) != small(seed=2).propose(0)


def test_the_parent_is_the_best_of_the_sample() -> None:
    evolution = small()
    run(evolution, 30)
    for k in range(30, 60):
        sample = evolution.tournament(k)
        best = max(member.fitness for member in sample)
        first = next(member for member in sample if member.fitness == best)
        assert evolution.propose(k).parent == first.candidate


def test_with_and_without_replacement() -> None:
    drawn = {}
    for replacement in (True, False):
        evolution = small(sample=6, replacement=replacement)
        run(evolution, 6)
        samples = [evolution.tournament(k) for k in range(100)]
        drawn[replacement] = [len({m.candidate for m in sample}) for sample in samples]
    assert set(drawn[False]) == {6} and min(drawn[True]) < 5


def test_minimising_is_maximising_the_negative() -> None:
    up = run(small(seed=3), 100)
    down = run(small(seed=3, maximise=False), 100, lambda bits: -ones(bits))
    assert up == down
    assert up != run(small(seed=3, maximise=False), 100)


@pytest.mark.parametrize("maximise", [True, False])
def test_the_optimum_is_reached_in_both_directions(maximise) -> None:
    optimum = 12 if maximise else 0
    texts = [row[0] for row in run(small(maximise=maximise, population=20, sample=10), 400)]
    assert any(text.count("1") == optimum for text in texts)


def test_elitist_removes_the_worst_of_all() -> None:
    evolution, fitness = small(algorithm="elitist"), {}
    for k, (text, _, _, removed) in enumerate(run(evolution, 100)):
        fitness[k] = text.count("1")
        if removed is not None:
            assert fitness.pop(removed) <= min(fitness.values())


def test_non_aging_removes_the_worst_of_the_parents_sample() -> None:
    evolution, not_worst_of_all = small(algorithm="non_aging"), 0
    run(evolution, 6)
    for k in range(6, 200):
        proposal, sample = evolution.propose(k), evolution.tournament(k)
        assert proposal.sample == tuple(member.candidate for member in sample)
        worst = min(member.fitness for member in sample)
        first = next(member for member in evolution.members if member in sample
                     and member.fitness == worst)  # fmt: skip
        not_worst_of_all += worst > min(member.fitness for member in evolution.members)
        newcomer = Member(k, proposal.architecture, ones(proposal.architecture), k)
        assert evolution.add(newcomer, proposal.sample) == first
        assert len(evolution.members) == 6 and evolution.members[-1] == newcomer
    assert not_worst_of_all > 50


def test_non_aging_draws_another_sample_if_all_of_it_has_left() -> None:
    """Draw a sample then, and for a random candidate; the newcomer is never in it."""
    evolution = small(algorithm="non_aging")
    run(evolution, 6)
    gone = evolution.propose(6).sample
    evolution.members = [m for m in evolution.members if m.candidate not in gone]
    evolution.members += [
        Member(k, (0,) * 12, 5.0, k) for k in range(10, 16 - len(evolution.members))
    ]
    before = list(evolution.members)
    removed = evolution.add(Member(20, (0,) * 12, -1.0, 20), gone)
    assert removed in before and removed.candidate != 20
    assert {evolution.add(Member(k, (0,) * 12, -1.0, k)) for k in range(21, 40)} & {None} == set()
    assert evolution.members[-1].candidate == 39


def test_random_search_never_has_a_parent() -> None:
    assert all(row[1] is None for row in run(small(algorithm="random"), 100))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"population": 0}, "`population` must be a whole number of at least 1, got 0"),
        ({"sample": True}, "`sample` must be a whole number of at least 1, got True"),
        ({"seed": 0.5}, "`seed` must be a whole number, got 0.5"),
        ({"sample": 7, "replacement": False}, "sample 7 is more than population 6, which cannot"),
        ({"algorithm": "ageing"}, "algorithm: unknown 'ageing'; did you mean 'aging'"),
        ({"fitness_policy": "warm"}, "fitness_policy: unknown 'warm'; known: stored, retrain_"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        small(**settings)
