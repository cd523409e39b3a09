"""Check the interpreter in the paper's space: fifty random architectures take one to two hours."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from builders import Pair, Step, assert_same, floored, random_genotype, shaken

from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import OPERATIONS, PAPER_OPERATIONS, Genotype
from nas.training.interpreter.network import Interpreter
from nas.training.network import Shape

pytestmark = pytest.mark.slow


@functools.cache  # with the interpreter's compiled program
def full(dtype: str, operations: tuple[str, ...] = PAPER_OPERATIONS) -> Pair:
    """Return both builders with enough examples: with 8, ten steps amplify rounding 1e8 times."""
    return Pair(Interpreter(Shape(1, 4, 8, 1, 10, dtype=dtype), operations), examples=32)


@pytest.fixture
def both_types() -> Iterator[tuple[Pair, Pair]]:
    """In float64 and in float32; what the layers compile is forgotten, as it fills the memory."""
    with jax.enable_x64(True):
        double = full("float64")
    yield double, full("float32")
    for pair in (double, full("float32")):
        pair.other.clear_cache()


@pytest.mark.parametrize("seed", range(50))
def test_random_architectures(both_types: tuple[Pair, Pair], seed: int) -> None:
    """In float64 alike; in float32 too, for one of four draws of the values.

    There a rounding error may bring a relu's input to the other side of zero, or make another of
    two elements the larger: then the gradients are those of another function.
    """
    (double, single), genotype = both_types, random_genotype(seed)
    with jax.enable_x64(True):
        assert_same(*double.both_steps(genotype), tolerance=1e-12)
        if seed < 20:
            losses = double.losses(genotype, steps=10)
            np.testing.assert_allclose(*losses, rtol=1e-9)
            assert losses[0][-1] < losses[0][0]
    assert any(single_agrees(double, single, genotype, draw) for draw in range(4))


def single_agrees(double: Pair, single: Pair, genotype: Genotype, draw: int) -> bool:
    """Check that float32 is within 1e-5 of the layers in either type, or as near as they are."""
    computed, expected, _ = single.both_steps(genotype, draw)
    with jax.enable_x64(True):
        given = (shaken(single.static, genotype, draw), single.images)
        given = jax.tree.map(lambda a: a.astype("float64"), given)
        exact = double.other(double.static.encode(genotype), *given)
    agree = True
    for name, *steps in zip(Step._fields, computed, expected, exact, strict=True):
        a, b, c = (floored(a, steps[2]) if name == "gradients" else a for a in steps)
        error, own, apart = (largest_error(*pair) for pair in ((a, c), (b, c), (a, b)))
        print(f"{draw} {name}: {error:.1e} from float64, layers {own:.1e}, from these {apart:.1e}")
        agree &= min(error, apart) <= max(1e-5, 2 * min(own, 5e-5))
    return agree


def largest_error(tree: object, exact: object) -> float:
    """Return the largest error in any leaf, relative to the leaf's largest element."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(exact), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


@pytest.mark.timeout(7200)
def test_three_cells_in_a_stack() -> None:
    """Test as many cells as the paper's search has: the loop over a stack has a middle."""
    with jax.enable_x64(True):
        pair = Pair(Interpreter(Shape(3, 4, 8, 1, 10, dtype="float64"), OPERATIONS), examples=32)
        assert_same(*pair.both_steps(GENOTYPES["A"]), tolerance=1e-12)


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_the_published_architectures(dtype: str, tolerance: float) -> None:
    with jax.enable_x64(dtype == "float64"):
        pair = full(dtype, OPERATIONS)
        for letter in "ABCD":
            assert_same(*pair.both_steps(GENOTYPES[letter]), tolerance=tolerance)
