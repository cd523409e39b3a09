"""Check that one program for all architectures computes what each one's own program does."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from builders import Pair, Step, assert_same, random_genotype, shaken, step

from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import Cell, Genotype
from nas.spaces.nasnet import NASNetSpace
from nas.training.interpreter.network import Interpreter
from nas.training.interpreter.translation import from_static, to_static
from nas.training.network import Shape
from nas.training.static import Static

SPACE = NASNetSpace(2, ("identity", "sep_3x3", "max_pool_3x3", "conv_1x7_7x1"))
SMALL = Shape(cells_per_stack=2, filters=4, image=8, channels=1, classes=3, dtype="float64")


def cell(*pairs: tuple, concat: tuple[int, ...]) -> Cell:
    return Cell(pairs, concat)


# All inputs in the output, in another order; one state in the output; two in a reduction cell, for
# which a match passes the states through.
SPECIAL = {
    "inputs": Genotype(
        cell((("sep_3x3", 1), ("identity", 1)), (("conv_1x7_7x1", 2), ("sep_3x3", 0)),
             concat=(3, 1, 0)),
        cell((("sep_3x3", 0), ("identity", 1)), (("max_pool_3x3", 1), ("sep_3x3", 2)),
             concat=(1, 3, 0)),
    ),
    "narrow": Genotype(
        cell((("identity", 0), ("max_pool_3x3", 1)), (("sep_3x3", 2), ("identity", 2)),
             concat=(3,)),
        cell((("conv_1x7_7x1", 0), ("sep_3x3", 1)), (("identity", 2), ("max_pool_3x3", 0)),
             concat=(3,)),
    ),
    "two": Genotype(
        cell((("sep_3x3", 0), ("sep_3x3", 0)), (("conv_1x7_7x1", 1), ("identity", 1)),
             concat=(3, 2)),
        cell((("max_pool_3x3", 1), ("sep_3x3", 0)), (("identity", 1), ("identity", 0)),
             concat=(2, 3)),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with jax.enable_x64(True):
        yield Pair(Interpreter(SMALL, SPACE.operations, pairs=2))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["narrow", pytest.param("inputs", marks=SLOW), pytest.param("two", marks=SLOW)]
)
def test_a_step_equals_that_of_the_layers(pair: Pair, name: str) -> None:
    """Outputs, all gradients and batch statistics; padding has gradient zero."""
    assert_same(*pair.both_steps(SPECIAL[name]), tolerance=1e-12)


def test_all_architectures_share_one_program(pair: Pair) -> None:
    losses = set()
    for seed in range(3):
        genotype = random_genotype(seed, SPACE)
        architecture = pair.interpreter.encode(genotype)
        values = from_static(pair.interpreter, genotype, shaken(pair.static, genotype))
        losses.add(float(pair.interpreted_step(architecture, values, pair.images).loss))
    assert len(losses) == 3 and np.isfinite(list(losses)).all()


def test_what_is_not_chosen_is_not_computed(pair: Pair) -> None:
    """Check that the compiled step has real conditionals, not selections among all results."""
    genotype = SPECIAL["narrow"]
    values = from_static(pair.interpreter, genotype, shaken(pair.static, genotype))
    pair.interpreted_step(pair.interpreter.encode(genotype), values, pair.images)
    assert pair.program is not None
    text = pair.program.as_text()
    assert text is not None
    # Forward, backward and evaluation, each: slots of six bodies (the cells of a stack share
    # one), outputs of the first cell and of both reduction cells, and four optional matches.
    # The compiler may copy some.
    assert text.count(" conditional(") >= 3 * (6 + 1 + 2 * 2 + 4)


@SLOW
def test_values_survive_both_translations(pair: Pair) -> None:
    for genotype in SPECIAL.values():
        values = shaken(pair.static, genotype)
        translated = from_static(pair.interpreter, genotype, values)
        back = to_static(pair.interpreter, genotype, translated)
        jax.tree.map(np.testing.assert_array_equal, back, values)
        used = pair.interpreter.used(pair.interpreter.encode(genotype))
        sizes = [sum(np.sum(a) for a in jax.tree.leaves(tree)) for tree in (used,)]
        assert sizes == [sum(a.size for a in jax.tree.leaves(values.parameters))]
        assert jax.tree.structure(used) == jax.tree.structure(translated.parameters)
        jax.tree.map(lambda a, u: np.testing.assert_array_equal(a[u == 0], 0), translated[0], used)


@SLOW
def test_initial_values_are_distributed_like_the_layers() -> None:
    """Means, spreads and bounds, of every array that is large enough to tell."""
    shape = Shape(cells_per_stack=2, filters=32, image=8, channels=3, classes=10)
    interpreter, static = Interpreter(shape), Static(shape)
    genotype = random_genotype(2)
    values = interpreter.init(interpreter.encode(genotype), jax.random.key(1))
    ours = to_static(interpreter, genotype, values)
    compared = 0
    for i, layer in enumerate(static.layers(static.encode(genotype))):
        if i > 4:
            break  # the same kinds of cells again
        theirs = jax.jit(layer.init)(jax.random.key(2), None)
        for a, b in zip(jax.tree.leaves(ours[0][i]), jax.tree.leaves(theirs), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            if np.ptp(b) == 0:
                np.testing.assert_array_equal(a, b)
            elif a.size >= 1000:
                compared += 1
                assert np.std(a) == pytest.approx(np.std(b), rel=0.12)
                assert np.abs(a).max() == pytest.approx(np.abs(b).max(), rel=0.12)
    assert compared > 10
    jax.tree.map(
        np.testing.assert_array_equal,
        ours[1],
        static.init(static.encode(genotype), jax.random.key(0))[1],
    )


@functools.partial(jax.jit, static_argnums=0)
def inherited(interpreter: Interpreter, child: Any, parent: Any) -> tuple:
    """Return fresh values, a parent's values (about 1000), and what the child gets of both."""
    fresh = interpreter.init(child, jax.random.key(0))
    old = jax.tree.map(lambda a: a + 1000.0, interpreter.init(parent, jax.random.key(1)))
    return fresh, old, interpreter.inherit(child, parent, fresh, old)


def test_a_child_takes_what_it_shares_with_its_parent(pair: Pair) -> None:
    interpreter = pair.interpreter
    parent = SPECIAL["two"]
    (first, second), concat = parent.normal.pairs, parent.normal.concat
    pairs = ((("sep_3x3", 0), ("max_pool_3x3", 0)), second)  # one operation is another
    child = Genotype(Cell(pairs, concat), Cell(parent.reduction.pairs, (3,)))
    assert first[0] == pairs[0][0]
    codes = interpreter.encode(child), interpreter.encode(parent)
    values = inherited(interpreter, *codes)[2]
    static = to_static(interpreter, child, values).parameters

    def trained_leaf(a):
        return bool((np.abs(a) > 500).all())

    stem, normal, *_ = static
    assert all(map(trained_leaf, jax.tree.leaves((stem, normal))))
    assert set(normal["operations"]) == {0, 2, 3}  # the maximum has no parameters
    reduction, after = static[3], static[4]
    assert all(map(trained_leaf, jax.tree.leaves(reduction)))
    # The next cell reads state 3 only: the rows of that are its parent's.
    assert after["enter"]["kernel"].shape == (1, 1, 8, 8) and trained_leaf(after["enter"]["kernel"])
    used = interpreter.used(codes[0])
    jax.tree.map(lambda a, u: np.testing.assert_array_equal(a[u == 0], 0), values[0], used)


def test_a_changed_operation_starts_fresh(pair: Pair) -> None:
    interpreter, parent = pair.interpreter, SPECIAL["two"]
    pairs = ((("conv_1x7_7x1", 0), ("sep_3x3", 0)), parent.normal.pairs[1])
    child = Genotype(Cell(pairs, parent.normal.concat), parent.reduction)
    codes = interpreter.encode(child), interpreter.encode(parent)
    fresh, trained, values = inherited(interpreter, *codes)
    changed, kept = (to_static(interpreter, child, values)[0][1]["operations"][j] for j in (0, 1))
    assert all(np.abs(a).max() < 500 for a in jax.tree.leaves(changed))
    assert all(np.abs(a).min() > 500 for a in jax.tree.leaves(kept))
    static = pair.static
    expected = static.inherit(
        static.encode(child),
        static.encode(parent),
        to_static(interpreter, child, fresh),
        to_static(interpreter, parent, trained),
    )
    jax.tree.map(np.testing.assert_array_equal, to_static(interpreter, child, values), expected)


def test_projections_inherit_rows_of_shared_states(pair: Pair) -> None:
    """Check both builders; the child concatenates as many states as its parent, but other ones."""
    interpreter, static, parent = pair.interpreter, pair.static, SPECIAL["two"]
    child = Genotype(cell(*parent.normal.pairs, concat=(1, 3)), SPECIAL["narrow"].reduction)

    @jax.jit  # soon compiled, unlike its operations one by one
    def inherit_both(fresh, trained):
        translated = (
            from_static(interpreter, child, fresh),
            from_static(interpreter, parent, trained),
        )
        codes = interpreter.encode(child), interpreter.encode(parent)
        computed = to_static(interpreter, child, interpreter.inherit(*codes, *translated))
        return computed, static.inherit(static.encode(child), static.encode(parent), fresh, trained)

    values = shaken(static, child), shaken(static, parent, seed=1)
    computed, expected = inherit_both(*values)
    jax.tree.map(np.testing.assert_array_equal, computed, expected)
    fresh, trained, new = (v.parameters[2]["enter"]["kernel"][0, 0] for v in (*values, expected))
    np.testing.assert_array_equal(new[:4], fresh[:4])  # of state 1, which its parent has not
    np.testing.assert_array_equal(new[4:], trained[:4])  # of state 3, which its parent has first


def test_genotypes_of_another_space_are_refused() -> None:
    interpreter = Interpreter(SMALL)
    with pytest.raises(ValueError, match="normal cell has 2 pairs, but this interpreter's cells"):
        interpreter.encode(SPECIAL["two"])
    with pytest.raises(ValueError, match="normal cell has conv_1x1, but this interpreter knows"):
        interpreter.encode(GENOTYPES["D"])
    with pytest.raises(ValueError, match="`stem` is 'imagenet', but the interpreter knows only"):
        Interpreter(Shape(1, 4, 8, 1, 10, stem="imagenet"))
    with pytest.raises(ValueError, match="`image` is 2, but cell 4 of 5 halves its input"):
        Interpreter(Shape(1, 4, 2, 1, 10)).encode(GENOTYPES["A"])


@SLOW
@pytest.mark.timeout(1800)
def test_bfloat16_errors_equal_those_of_the_layers() -> None:
    """Compare the errors relative to the layers' step in float32, over four draws of values."""
    single, half = (
        replace(SMALL, cells_per_stack=1, dtype=dtype) for dtype in ("float32", "bfloat16")
    )
    layers, pair = Static(single), Pair(Interpreter(half, SPACE.operations, pairs=2), examples=32)
    exact = jax.jit(functools.partial(step, layers))
    for name in ("inputs", "narrow"):
        measured = np.array([errors(pair, layers, exact, SPECIAL[name], seed) for seed in range(4)])
        mine, usual = np.sqrt(np.mean(measured**2, 0))
        assert (mine < 2 * usual + 1e-3).all(), (name, mine, usual)
        for errors_of in (mine, usual):  # of another type, but of no other network
            assert (errors_of < 0.7).all() and errors_of[Step._fields.index("scores")] > 1e-3


def errors(pair: Pair, layers: Static, exact: Any, genotype: Genotype, seed: int) -> list:
    """Return the error of each part of a step, by the interpreter and by the layers in its type."""
    images = pair.images.astype("float32")  # each network computes in its own type
    values = shaken(layers, genotype, seed)
    architecture = pair.static.encode(genotype)
    expected = exact(architecture, values, images)
    theirs = pair.static_step(architecture, values, images)
    translated = from_static(pair.interpreter, genotype, values)
    ours = pair.interpreted_step(pair.interpreter.encode(genotype), translated, images)
    static_form = to_static(pair.interpreter, genotype, (ours.gradients, ours.statistics))
    ours = ours._replace(gradients=static_form[0], statistics=static_form[1])
    assert {a.dtype for a in jax.tree.leaves((ours, theirs))} == {jnp.dtype("float32")}
    return [
        [distance(*each) for each in zip(computed, expected, strict=True)]
        for computed in (ours, theirs)
    ]


def distance(measured: object, expected: object) -> float:
    """Return the distance of all leaves together, relative to the expected ones."""
    pairs = zip(jax.tree.leaves(measured), jax.tree.leaves(expected), strict=True)
    apart, sizes = zip(*((np.sum((a - b) ** 2), np.sum(b**2)) for a, b in pairs), strict=True)
    return float(np.sqrt(sum(apart) / sum(sizes)))
