"""The rectangular form of ragged networks: nothing lost, nothing mixed up, little wasted."""

import random
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpipe_jax import sequential, zoo
from gpipe_jax.cost import tree_bytes
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shapes import LayerShape, infer_shapes
from gpipe_jax.stages import MAX_UNROLL, SLOT_SLACK, Stages
from gpipe_jax.wire import Wire

PyTree = Any
X = jax.ShapeDtypeStruct((2, 3), jnp.float32)


@dataclass(frozen=True)
class Fake(Layer):
    """Parameters of these shapes; passes its input on, plus the sum of its parameters and a key."""

    name: str
    shapes: tuple[tuple[tuple[int, ...], str], ...]

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        return {f"p{i}": jnp.ones(shape, dtype) for i, (shape, dtype) in enumerate(self.shapes)}

    def apply(self, params: PyTree, x: PyTree, key: jax.Array, *, train: bool) -> PyTree:
        total = sum(p.astype(jnp.float32).sum() for p in jax.tree.leaves(params))
        return 0.5 * x + total + jax.random.normal(key) * (1.0 if train else 0.0)


DTYPES = ("float32", "bfloat16", "float16")


def random_network(
    seed: int, dtypes: tuple[str, ...] = DTYPES
) -> tuple[list[LayerShape], list[range]]:
    """Layers of 0 to 3 parameters, many repeated, of rank 0 to 3; cut at random."""
    rng = random.Random(seed)
    palette = [
        Fake(
            str(i),
            tuple(
                (tuple(rng.randint(1, 4) for _ in range(rng.randint(0, 3))), rng.choice(dtypes))
                for _ in range(rng.randint(0, 3))
            ),
        )
        for i in range(4)
    ]
    layers = [one for _ in range(6) for one in [rng.choice(palette)] * rng.randint(1, 4)]
    stages = rng.randint(1, 6)
    inner = sorted(rng.sample(range(1, len(layers)), stages - 1))
    cuts = [range(a, b) for a, b in zip([0, *inner], [*inner, len(layers)], strict=True)]
    return infer_shapes(layers, X), cuts


def fill(tree: PyTree, rng: np.random.Generator) -> PyTree:
    """Distinct values, exact in every dtype."""
    return jax.tree.map(lambda a: rng.integers(-100, 100, a.shape).astype(a.dtype), tree)


def assert_equal(actual: PyTree, wanted: PyTree) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def filled(stages: Stages, k: int, rng: np.random.Generator) -> list[PyTree]:
    """Parameters for each layer of stage k."""
    return [fill(stages.shapes[i].params, rng) for i in stages.cuts[k]]


@pytest.mark.parametrize("seed", range(40))
def test_layers_survive_the_rectangular_form(seed: int) -> None:
    shapes, cuts = random_network(seed)
    stages, rng = Stages(shapes, cuts), np.random.default_rng(seed)
    for k in range(stages.count):
        layers = filled(stages, k, rng)
        params = stages.join_layers(k, layers)
        spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        assert spec == stages.local_shapes()  # the same on every device
        split = stages.split_layers(k, params)
        assert len(split) == len(layers)
        for actual, wanted in zip(split, layers, strict=True):
            assert_equal(actual, wanted)


@pytest.mark.parametrize("seed", range(40))
def test_read_inverts_write(seed: int) -> None:
    shapes, cuts = random_network(seed)
    stages, rng = Stages(shapes, cuts), np.random.default_rng(seed)
    for k in range(stages.count):
        params = stages.join_layers(k, filled(stages, k, rng))
        trees = stages.read(k, params)
        assert len(trees) == len(stages.runs[k])
        assert_equal(stages.write(k, trees, np), params)


@pytest.mark.parametrize("seed", range(40))
def test_what_a_stage_does_not_use_is_zero_and_what_it_uses_is_all_it_has(seed: int) -> None:
    shapes, cuts = random_network(seed)
    stages = Stages(shapes, cuts)
    for k in range(stages.count):
        ones = [
            jax.tree.map(lambda a: np.ones(a.shape, a.dtype), shapes[i].params) for i in cuts[k]
        ]
        params, used = stages.join_layers(k, ones), stages.used(k)
        count = sum(float(a.astype(np.float32).sum()) for a in jax.tree.leaves(params))
        assert count == sum(a.size for tree in ones for a in jax.tree.leaves(tree))
        for name in ("slots", "packs"):
            nonzero = [i for i, a in enumerate(params[name]) if a.any()]
            assert nonzero == used[name]


def test_read_and_write_under_jit_are_those_of_numpy() -> None:
    shapes, cuts = random_network(3)
    stages, rng = Stages(shapes, cuts), np.random.default_rng(0)
    for k in range(stages.count):
        params = stages.join_layers(k, filled(stages, k, rng))
        again = jax.jit(lambda p, k=k: stages.write(k, stages.read(k, p)))(params)
        assert_equal(jax.device_get(again), params)


# ---- slots and packs ----------------------------------------------------------------------------


def body_of_transformer(blocks: int) -> list[LayerShape]:
    layers = zoo.transformer_lm(
        vocabulary=7, length=4, width=8, heads=2, feed_forward=16, layers=blocks
    )[1:-1]
    return infer_shapes(layers, jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))


def even_cuts(layers: int, stages: int) -> list[range]:
    step = layers // stages
    return [range(i, i + step) for i in range(0, layers, step)]


def test_the_body_of_a_transformer_is_slots_without_padding() -> None:
    shapes = body_of_transformer(8)
    stages = Stages(shapes, even_cuts(8, 4))
    assert stages.packs == [] and {slot.depth for slot in stages.slots} == {2}
    assert {stages.parameter_bytes(k) for k in range(4)} == {stages.device_bytes()}
    assert not stages.wire.packed


def test_unequal_convolution_stages_are_packed_and_no_larger_than_the_largest() -> None:
    layers = zoo.convnet((8, 12, 16), (4, 2, 1))
    shapes = infer_shapes(layers, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    stages = Stages(shapes, [range(0, 3), range(3, 5), range(5, 7), range(7, 9)])
    largest = max(stages.parameter_bytes(k) for k in range(4))
    assert stages.packs and stages.wire.packed
    assert largest <= stages.device_bytes() <= largest * (1 + SLOT_SLACK)
    # Slots alone would hold one of almost everything.
    assert stages.device_bytes() < 0.5 * sum(stages.parameter_bytes(k) for k in range(4))


@pytest.mark.parametrize(
    ("seed", "dtypes"),
    [
        *((seed, DTYPES[:1]) for seed in range(40)),
        *((seed, DTYPES) for seed in range(40)),
    ],
)
def test_padding_is_at_most_that_of_packing_everything_and_the_slack(
    seed: int, dtypes: tuple[str, ...]
) -> None:
    shapes, cuts = random_network(seed, dtypes)
    stages = Stages(shapes, cuts)
    own: dict[Any, list[int]] = {}  # bytes of each stage, by dtype
    for k, cut in enumerate(cuts):
        for a in jax.tree.leaves([shapes[i].params for i in cut]):
            own.setdefault(a.dtype, [0] * len(cuts))[k] += tree_bytes([a])
    packed = sum(max(of_stage) for of_stage in own.values())
    assert stages.device_bytes() <= packed * (1 + SLOT_SLACK)


@pytest.mark.parametrize("seed", range(40))
def test_bytes_are_those_of_the_arrays(seed: int) -> None:
    shapes, cuts = random_network(seed)
    stages = Stages(shapes, cuts)
    own = [tree_bytes([shapes[i].params for i in cut]) for cut in cuts]
    assert [stages.parameter_bytes(k) for k in range(stages.count)] == own
    assert stages.device_bytes() == tree_bytes(stages.local_shapes()) >= max(own)


def test_one_stage_holds_its_parameters_and_nothing_else() -> None:
    shapes, _ = random_network(1)
    stages = Stages(shapes, [range(len(shapes))])
    assert (
        stages.device_bytes()
        == stages.parameter_bytes(0)
        == tree_bytes([shape.params for shape in shapes])
    )
    assert stages.kind == [0] and stages.wire.shapes == []


# ---- kinds and runs -----------------------------------------------------------------------------


def test_equal_stages_share_a_kind_except_at_the_ends() -> None:
    stages = Stages(body_of_transformer(10), even_cuts(10, 5))
    assert stages.kind == [0, 1, 1, 1, 4]


def test_stages_with_other_layers_or_other_inputs_have_their_own_kind() -> None:
    small, large = Fake("a", (((2,), "float32"),)), Fake("b", (((2,), "float32"),))
    shapes = infer_shapes([small, small, large, small, small], X)
    assert Stages(shapes, even_cuts(5, 5)).kind == [0, 1, 2, 1, 4]
    wider = shapes[3]._replace(input=jax.ShapeDtypeStruct((4, 3), jnp.float32))
    assert Stages([*shapes[:3], wider, shapes[4]], even_cuts(5, 5)).kind == [0, 1, 2, 3, 4]


def test_equal_neighbours_are_one_run() -> None:
    a, b = Fake("a", ()), Fake("b", ())
    shapes = infer_shapes([a, a, b, a, a, a, a], X)
    runs = Stages(shapes, [range(0, 5), range(5, 7)]).runs
    assert [(run.layer, run.start, run.count) for run in runs[0]] == [
        (a, 0, 2),
        (b, 2, 1),
        (a, 3, 2),
    ]
    assert [(run.start, run.count) for run in runs[1]] == [(0, 2)]


def test_layers_whose_output_differs_from_their_input_are_no_run() -> None:
    x = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    shapes = infer_shapes([Fake("a", ())] * 3, x)  # int32 becomes float32
    assert [run.count for run in Stages(shapes, [range(3)]).runs[0]] == [1, 2]


def test_layer_ids_are_global() -> None:
    shapes = infer_shapes([Fake("a", ())] * 6, X)
    ids = Stages(shapes, [range(0, 1), range(1, 4), range(4, 6)]).layer_ids()
    assert ids.tolist() == [[0, 0, 0], [1, 2, 3], [4, 5, 0]] and ids.dtype == np.int32


# ---- computation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "remat"), [(2, True), (MAX_UNROLL, False), (MAX_UNROLL + 1, False)]
)
def test_stages_in_turn_are_the_sequential_program(count: int, remat: bool) -> None:
    """Unrolled or scanned; every layer with its own parameters and its own key."""
    one, odd = Fake("a", (((2, 2), "float32"), ((), "float32"))), Fake("b", (((3,), "float32"),))
    layers = [odd, *[one] * count, odd, odd]
    shapes, rng = infer_shapes(layers, X), np.random.default_rng(0)
    stages = Stages(shapes, [range(0, count + 1), range(count + 1, count + 3)], remat_layers=remat)
    params = [fill(shape.params, rng) for shape in shapes]
    key, x = jax.random.key(0), jnp.ones(X.shape)

    @jax.jit
    def staged(x: jax.Array) -> jax.Array:
        for k, cut in enumerate(stages.cuts):
            local = stages.join_layers(k, [params[i] for i in cut])
            ids = jnp.asarray(stages.layer_ids()[k])
            x = stages.forward(k, local, x, ids, key, 3, train=True)
        return x

    wanted = jax.jit(lambda x: sequential.forward(layers, params, x, key, 3, train=True))(x)
    np.testing.assert_allclose(staged(x), wanted, rtol=1e-5)
    text = str(jax.make_jaxpr(staged)(x))
    assert ("scan[" in text) == (count > MAX_UNROLL)
    assert ("checkpoint[" in text or "remat" in text) == remat


def test_build_makes_every_layer_from_its_own_id() -> None:
    one, odd = (Fake(name, (((2,), "float32"),)) for name in "ab")
    shapes = infer_shapes([one, one, odd, one, one], X)
    stages = Stages(shapes, [range(0, 1), range(1, 5)])  # runs of 1; of 1, 1 and 2
    make = lambda shape, i: jax.tree.map(  # noqa: E731
        lambda a: jnp.full(a.shape, i, a.dtype), shape.params
    )
    for k, cut in enumerate(stages.cuts):
        ids = jnp.asarray(stages.layer_ids()[k])
        built = jax.device_get(jax.jit(lambda ids, k=k: stages.build(k, ids, make))(ids))
        wanted = [{"p0": np.full(2, i, np.float32)} for i in cut]
        for actual, expected in zip(stages.split_layers(k, built), wanted, strict=True):
            assert_equal(actual, expected)


# ---- wire ---------------------------------------------------------------------------------------


def spec(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


RAGGED = [
    {"x": spec((2, 3)), "skip": (spec((2,)), spec((4, 1))), "ids": spec((2, 5), jnp.int32)},
    {"x": spec((2, 7)), "skip": (), "ids": spec((2, 2), jnp.int32)},
    {"x": spec((2, 2, 2)), "half": spec((3,), jnp.bfloat16), "scalar": spec(())},
]
ALIKE = [{"x": spec((2, 3)), "ids": spec((2,), jnp.int32)}] * 3


@pytest.mark.parametrize("boundaries", [RAGGED, ALIKE, RAGGED[:1], []])
def test_boundaries_survive_the_wire(boundaries: list[PyTree]) -> None:
    wire, rng = Wire(boundaries), np.random.default_rng(0)
    for tree in boundaries:
        specs = jax.tree.leaves(tree)
        leaves = [jnp.asarray(a) for a in jax.tree.leaves(fill(tree, rng))]
        arrays = wire.encode(leaves, wire.shapes)
        assert [(a.shape, a.dtype) for a in arrays] == [(s.shape, s.dtype) for s in wire.shapes]
        assert_equal(wire.decode(arrays, specs), leaves)


def test_gradients_survive_the_wire_without_the_integers() -> None:
    wire, rng = Wire(RAGGED), np.random.default_rng(0)
    assert all(jnp.issubdtype(s.dtype, jnp.floating) for s in wire.gradient_shapes)
    for tree in RAGGED:
        specs = [s for s in jax.tree.leaves(tree) if s.dtype != jnp.int32]
        leaves = [jnp.asarray(fill(s, rng)) for s in specs]
        arrays = wire.encode(leaves, wire.gradient_shapes)
        assert [a.dtype for a in arrays] == [s.dtype for s in wire.gradient_shapes]
        assert_equal(wire.decode(arrays, specs), leaves)


def test_boundaries_that_are_alike_keep_their_shapes_and_others_are_packed_to_the_largest() -> None:
    alike, ragged = Wire(ALIKE), Wire(RAGGED)
    assert not alike.packed and [s.shape for s in alike.shapes] == [(2,), (2, 3)]
    assert ragged.packed
    widths = {str(s.dtype): s.shape for s in ragged.shapes}
    assert widths == {"bfloat16": (3,), "float32": (14,), "int32": (10,)}
    same_shapes_in_other_trees = Wire([{"x": spec((2,))}, (spec((2,)),)])
    assert same_shapes_in_other_trees.packed
