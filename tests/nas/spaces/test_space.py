"""Draw, mutate and compare architectures of the built-in spaces."""

import random
from collections import Counter

import numpy as np
import pytest
from searches import DATA, HAS_TABLE, NO_TABLE, Bits

import nas
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import PAPER_OPERATIONS
from gpipe_jax.utils.graph_drawing import Picture
from nas.evaluators import nasbench201_table
from nas.spaces import nasbench201, pictures, space

SPACES = [nas.NASNetSpace(), nas.NASNetSpace(3, ("identity", "sep_3x3")), nas.NASBench201Space(),
          Bits()]  # fmt: skip


@pytest.mark.parametrize("each", SPACES, ids=lambda each: each.name)
def test_spaces_obey_the_rules(each) -> None:
    nas.testing.check_space(each)


class InPlace(Bits):
    def random(self, rng):
        return list(super().random(rng))

    def mutate(self, bits, rng):
        bits[rng.randrange(len(bits))] ^= 1
        return bits, "flip: a bit"

    def decode(self, text):
        return list(super().decode(text))


class SortedInPlace(InPlace):
    mutate = Bits.mutate

    def canonical(self, bits):
        bits.sort()
        return self.encode(bits)


class CutInPlace(SortedInPlace):
    canonical = Bits.canonical

    def encode(self, bits):
        text = super().encode(bits)
        bits.pop()
        return text


class OneList(InPlace):
    bits = [0] * Bits.length

    def random(self, rng):
        self.bits[:] = super().random(rng)
        return self.bits


class Global(Bits):
    def random(self, rng):
        return super().random(random)


class Lossy(Bits):
    def encode(self, bits):
        return "".join(map(str, bits[:-1]))


class Unnamed(Bits):
    def mutate(self, bits, rng):
        return super().mutate(bits, rng)[0], "a flip"


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        (InPlace(), "mutate: changed its argument '[01]+' in place"),
        (SortedInPlace(), r"canonical: changed its argument \[.* in place"),
        (CutInPlace(), r"encode: changed its argument \[.* in place"),
        (OneList(), r"random: changed its last result \[.* in place"),
        (Global(), r"random: seed 0 gave \(.*, then"),
        (Lossy(), "decode: '[01]+' became"),
        (Unnamed(), "mutate: expected words such as 'op: edge 2, a -> b', got 'a flip'"),
    ],
)
def test_a_space_that_breaks_a_rule_is_detected(broken, rule) -> None:
    with pytest.raises(AssertionError, match=rule):
        nas.testing.check_space(broken)


def test_an_unknown_space_is_named() -> None:
    with pytest.raises(ValueError, match="unknown space 'nasnett'; did you mean 'nasnet'"):
        space.as_space("nasnett")
    with pytest.raises(ValueError, match=r"has no name, random, .*: give an object with"):
        space.as_space(object())
    with pytest.raises(ValueError, match="is a class: give an object"):
        space.as_space(Bits)


# --- NASNet ---------------------------------------------------------------------------------------


def test_random_cells_are_uniform_and_concatenate_unread_states() -> None:
    rng, each = random.Random(0), nas.NASNetSpace()
    drawn = [each.random(rng) for _ in range(3000)]
    states = Counter(cell.pairs[4][1][1] for g in drawn for cell in (g.normal, g.reduction))
    operations = Counter(g.normal.pairs[0][0][0] for g in drawn)
    assert sorted(states) == list(range(6)) and set(operations) == set(PAPER_OPERATIONS)
    assert max(abs(n - 1000) for n in states.values()) < 4 * 1000**0.5
    assert max(abs(n - 375) for n in operations.values()) < 4 * 375**0.5
    assert all(g.normal.concat == g.normal.unused() for g in drawn)


def test_mutations_are_those_of_the_paper() -> None:
    """Change one element: identity 5 %, hidden state and operation 47.5 % each."""
    rng, each = random.Random(1), nas.NASNetSpace()
    kinds: Counter = Counter()
    for _ in range(4000):
        parent = each.random(rng)
        child, words = each.mutate(parent, rng)
        kind = words.split(":")[0]
        kinds[kind] += 1
        changed = [
            (old, new)
            for a, b in ((parent.normal, child.normal), (parent.reduction, child.reduction))
            for p, q in zip(a.pairs, b.pairs, strict=True)
            for old, new in zip(p, q, strict=True)
            if old != new
        ]
        assert len(changed) <= 1
        if kind == "hidden_state":  # another one, always
            assert changed[0][0][0] == changed[0][1][0] and changed[0][0][1] != changed[0][1][1]
        if kind == "op" and changed:
            assert changed[0][0][1] == changed[0][1][1]
        if kind == "identity":
            assert child == parent
        assert child.normal.concat == child.normal.unused()
    for kind, share in (("identity", 0.05), ("hidden_state", 0.475), ("op", 0.475)):
        assert abs(kinds[kind] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize("name", GENOTYPES)
def test_published_genotypes_can_be_stored(name) -> None:
    each = nas.NASNetSpace()
    assert each.decode(each.encode(GENOTYPES[name])) == GENOTYPES[name]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="`pairs` must be a whole number of at least 1, got 0"):
        nas.NASNetSpace(pairs=0)
    with pytest.raises(ValueError, match=r"`operations`: expected some of .*, got \['sep_9x9'\]"):
        nas.NASNetSpace(operations=("sep_9x9",))


# --- NAS-Bench-201 --------------------------------------------------------------------------------


def test_a_mutation_changes_one_edge() -> None:
    rng, each = random.Random(2), nas.NASBench201Space()
    changed: Counter = Counter()
    for _ in range(3000):
        parent = each.random(rng)
        child, words = each.mutate(parent, rng)
        edges = [i for i in range(6) if parent[i] != child[i]]
        assert len(edges) == 1
        source, target = nasbench201.EDGES[edges[0]]
        assert f"edge {source} to {target}, " in words
        changed[target] += 1
    assert all(abs(n - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for n in changed.values())  # by node


def test_equivalent_cells_share_a_canonical_form() -> None:
    each = nas.NASBench201Space()
    skip_then_conv = each.decode(
        "|skip_connect~0|+|none~0|nor_conv_3x3~1|+|none~0|none~1|skip_connect~2|"
    )
    conv = each.decode("|none~0|+|none~0|none~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|")
    other = each.decode("|none~0|+|none~0|none~1|+|nor_conv_1x1~0|avg_pool_3x3~1|none~2|")
    assert each.canonical(skip_then_conv) == each.canonical(conv) == "nor_conv_3x3(x)"
    assert each.canonical(other) != each.canonical(conv)


@pytest.mark.parametrize(
    "text", ["", "|none~0|", "|none~0|+|none~0|none~1|+|none~0|none~1|what~2|"]
)
def test_other_texts_are_no_cells(text) -> None:
    with pytest.raises(ValueError, match="is not a cell of NAS-Bench-201: expected a text such as"):
        nas.NASBench201Space().decode(text)


@pytest.mark.skipif(not HAS_TABLE, reason=NO_TABLE)
def test_the_table_and_its_classes() -> None:
    """Compare texts, the optimum and canonical forms; each published class has only one form."""
    each, table = nas.NASBench201Space(), nasbench201_table.NASBench201Table("cifar10", DATA)
    with np.load(table.path, allow_pickle=False) as file:
        texts, classes = file["arch_str"].tolist(), file["canonical_id"].tolist()
    cells = list(table.rows)
    assert [each.encode(cell) for cell in cells] == texts
    forms = [each.canonical(cell) for cell in cells]
    assert len(set(forms)) == 4930 and len(set(classes)) == 6466
    assert len(set(zip(classes, forms, strict=True))) == 6466
    assert max(table(cell)["test200"] for cell in cells) == pytest.approx(94.373, abs=5e-4)


def test_a_missing_table(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("GPIPE_JAX_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="is not given and GPIPE_JAX_DATA is not set: give"):
        nasbench201_table.NASBench201Table()
    with pytest.raises(FileNotFoundError, match=r"has no nb201\.npz; put it there"):
        nasbench201_table.NASBench201Table(folder=tmp_path)
    with pytest.raises(ValueError, match="dataset: unknown 'mnist'; known: cifar10, cifar100"):
        nasbench201_table.NASBench201Table("mnist")
    (tmp_path / "nb201.npz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read as NAS-Bench-201's table"):
        nasbench201_table.NASBench201Table(folder=tmp_path).rows  # noqa: B018


# --- pictures -------------------------------------------------------------------------------------


def test_a_new_built_in_space_is_drawn_without_a_change_elsewhere(monkeypatch) -> None:
    class Drawn(Bits):
        def pictures(self, bits, before=None):
            return [Picture(f"{bits} after {before}", 1.0, 1.0, [], [])]

        def differences(self, bits, before):
            return [f"{sum(bits) - sum(before)} more"]

    monkeypatch.setitem(space.SPACES, "bits", Drawn)
    new, old = pictures.read("bits, 12 of them", "101"), pictures.read("bits", "001")
    assert [picture.title for picture in pictures.pictures(new)] == ["(1, 0, 1) after None"]
    assert pictures.pictures(new, old)[0].title == "(1, 0, 1) after (0, 0, 1)"
    assert pictures.differences(new, old) == ["1 more"]


def test_a_space_without_pictures_is_shown_as_text(monkeypatch) -> None:
    monkeypatch.setitem(space.SPACES, "bits", Bits)
    for name in ("bits", "mine"):
        new, old = pictures.read(name, "101"), pictures.read(name, "001")
        assert pictures.pictures(new) == [] and pictures.differences(new, new) == []
        assert pictures.differences(new, old) == ["001 → 101"]
        assert ">101<" in pictures.html(new)
    assert isinstance(nas.NASNetSpace(), space.DrawableSpace)
    assert isinstance(nas.NASBench201Space(), space.DrawableSpace)
