"""Check where layers lie in stages, which stages share code, and that nothing is mixed up."""

import functools
import itertools
import random
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gpipe_jax import sequential, zoo
from gpipe_jax.distributed.mesh import STAGE, make_mesh
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.shape_inference import LayerShape, infer_shapes
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.pipeline import remat
from gpipe_jax.pipeline.ragged.boundary import BoundaryFormat
from gpipe_jax.pipeline.ragged.packing import SLOT_SLACK
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import from_block, to_block
from gpipe_jax.pipeline.stage_step import Call, StageStep
from gpipe_jax.utils.trees import PyTree, tree_bytes

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)
NO_ARRAYS: dict = {"slots": [], "packs": []}


@dataclass(frozen=True)
class Fake(Layer):
    """Have parameters of these shapes, and a statistic if `counts`.

    The output is the input, plus the sum of the parameters and a random number. The moment is the
    sum of the input; a commit adds it to the statistic.
    """

    name: str
    leaves: tuple[tuple[tuple[int, ...], str], ...] = ()
    counts: bool = False

    def init(self, key: jax.Array, x: PyTree) -> PyTree:
        return {f"p{i}": jnp.ones(shape, dtype) for i, (shape, dtype) in enumerate(self.leaves)}

    def init_statistics(self) -> PyTree:
        return {"sum": jnp.zeros(())} if self.counts else {}

    def apply(self, params: PyTree, stats: PyTree, x: PyTree, context: Context) -> tuple:
        total = sum(p.astype(jnp.float32).sum() for p in jax.tree.leaves(params))
        y = 0.5 * x + total + jax.random.normal(context.key) * (1.0 if context.train else 0.0)
        y = y * context.progress + sum(jax.tree.leaves(stats))
        return y, {"sum": x.sum()} if self.counts and context.train else {}

    def commit(self, stats: PyTree, moments: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, stats, moments)

    def __str__(self) -> str:
        return self.linked(self.name)


DTYPES = ("float32", "bfloat16", "float16")


def random_network(seed: int) -> tuple[list[LayerShape], list[range], int]:
    """Return random stages of layers, many repeated, with 0 to 3 parameters of rank 0 to 3."""
    rng = random.Random(seed)
    palette = [
        Fake(
            str(i),
            tuple(
                (tuple(rng.randint(1, 4) for _ in range(rng.randint(0, 3))), rng.choice(DTYPES))
                for _ in range(rng.randint(0, 3))
            ),
        )
        for i in range(4)
    ]
    layers = [a for _ in range(6) for a in [rng.choice(palette)] * rng.randint(1, 4)]
    chunks = rng.randint(1, 2)
    stages = chunks * rng.randint(1, 3)
    inner = sorted(rng.sample(range(1, len(layers)), stages - 1))
    cuts = [range(a, b) for a, b in zip([0, *inner], [*inner, len(layers)], strict=True)]
    return infer_shapes(layers, X), cuts, chunks


def fill(tree: PyTree, rng: np.random.Generator) -> PyTree:
    """Return random integers, exact in every dtype."""
    return jax.tree.map(lambda a: rng.integers(-100, 100, a.shape).astype(a.dtype), tree)


def assert_equal(actual: PyTree, expected: PyTree) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def join(stages: Stages, layers: list[PyTree], *, statistics: bool = False) -> list[PyTree]:
    """Return all devices' arrays [K, ...] of each chunk."""
    storages = stages.stats if statistics else stages.params
    blocks = [
        storages.join_block(k, layers.__getitem__) for k in range(stages.geometry.num_devices)
    ]
    return jax.tree.map(lambda *a: np.concatenate(a), *blocks)


def block_of(stages: Stages, k: int, arrays: list[PyTree]) -> list[PyTree]:
    return jax.tree.map(lambda a: np.split(np.asarray(a), stages.geometry.num_devices)[k], arrays)


def on_device(stages: Stages, k: int, arrays: list[PyTree]) -> list[PyTree]:
    return [from_block(chunk) for chunk in block_of(stages, k, arrays)]


def split(stages: Stages, arrays: list[PyTree]) -> list[PyTree]:
    """Return all layers' parameters, in order."""
    layers: dict[int, PyTree] = {}
    for k in range(stages.geometry.num_devices):
        layers |= stages.params.split_block(k, block_of(stages, k, arrays))
    return [layers[i] for i in range(len(layers))]


def even_cuts(layers: int, stages: int) -> list[range]:
    step = layers // stages
    return [range(i, i + step) for i in range(0, layers, step)]


# ---- where layers are ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_layers_survive_the_rectangular_form(seed: int) -> None:
    """Check the layer order for any number of devices and chunks, and each stage's own layers."""
    shapes, cuts, chunks = random_network(seed)
    stages, rng = Stages(shapes, cuts, chunks=chunks), np.random.default_rng(seed)
    layers = [fill(shape.params, rng) for shape in shapes]
    arrays = join(stages, layers)
    assert len(arrays) == chunks
    for local, storage in zip(on_device(stages, 0, arrays), stages.params, strict=True):
        spec = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), local)
        assert spec == storage.local_shapes()
    assert_equal(split(stages, arrays), layers)
    for s, cut in enumerate(cuts):
        c, k = stages.geometry.at(s)
        read = stages.params[c].read(k, on_device(stages, k, arrays)[c])
        assert_equal([tree for run in read for tree in run], [layers[i] for i in cut])


def test_stages_go_round_the_devices() -> None:
    """Check that chunk c of device k is stage c K + k."""
    shapes = infer_shapes([Fake("a")] * 6, X)
    stages = Stages(shapes, even_cuts(6, 6), chunks=2)
    assert (stages.geometry.num_devices, stages.geometry.last) == (3, 5)
    assert [stages.geometry.at(s) for s in range(6)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
        (1, 2),
    ]


def test_layer_ids_are_global() -> None:
    shapes = infer_shapes([Fake("a")] * 6, X)
    cuts = [range(0, 1), range(1, 4), range(4, 6)]
    ids = Stages(shapes, cuts).geometry.layer_ids()
    assert ids.tolist() == [[[0, 0, 0]], [[1, 2, 3]], [[4, 5, 0]]] and ids.dtype == np.int32
    cuts = [range(0, 1), range(1, 3), range(3, 5), range(5, 6)]
    ids = Stages(shapes, cuts, chunks=2).geometry.layer_ids()
    assert ids.tolist() == [[[0, 0], [3, 4]], [[1, 2], [5, 0]]]


def test_bytes_of_a_device_are_those_of_all_its_chunks() -> None:
    for seed in range(20):
        shapes, cuts, chunks = random_network(seed)
        stages, K = Stages(shapes, cuts, chunks=chunks), len(cuts) // chunks
        own = [tree_bytes([shapes[i].params for i in cut]) for cut in cuts]
        assert [stages.geometry.parameter_bytes(k) for k in range(K)] == [
            sum(own[k::K]) for k in range(K)
        ]
        local = [storage.local_shapes() for storage in stages.params]
        assert (
            stages.params.device_bytes()
            == tree_bytes(local)
            >= max(sum(own[k::K]) for k in range(K))
        )


def body_of_transformer(blocks: int) -> list[LayerShape]:
    layers = zoo.transformer_lm(
        vocabulary=7, length=4, width=8, heads=2, feed_forward=16, layers=blocks
    )[1:-1]
    return infer_shapes(layers, jax.ShapeDtypeStruct((2, 4, 8), jnp.float32))


def test_the_body_of_a_transformer_is_slots_without_padding() -> None:
    stages = Stages(body_of_transformer(8), even_cuts(8, 4))
    (storage,) = stages.params
    assert storage.packs == [] and {slot.depth for slot in storage.slots} == {2}
    assert {stages.geometry.parameter_bytes(k) for k in range(4)} == {stages.params.device_bytes()}
    assert not stages.boundary_format.packed


def test_convolution_stages_are_packed_to_the_largest() -> None:
    layers = zoo.convnet((8, 12, 16), (4, 2, 1))
    shapes = infer_shapes(layers, jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32))
    stages = Stages(shapes, [range(0, 3), range(3, 5), range(5, 7), range(7, 9)])
    largest = max(stages.geometry.parameter_bytes(k) for k in range(4))
    assert stages.params[0].packs and stages.boundary_format.packed
    assert largest <= stages.params.device_bytes() <= largest * (1 + SLOT_SLACK)
    # Slots alone would hold one of almost everything.
    assert stages.params.device_bytes() < 0.5 * sum(
        stages.geometry.parameter_bytes(k) for k in range(4)
    )


def test_one_stage_holds_its_parameters_and_nothing_else() -> None:
    shapes, *_ = random_network(1)
    stages = Stages(shapes, [range(len(shapes))])
    assert (
        stages.params.device_bytes()
        == stages.geometry.parameter_bytes(0)
        == tree_bytes([shape.params for shape in shapes])
    )
    assert stages.representatives == [0] and stages.boundary_format.shapes == []


@pytest.mark.parametrize("seed", range(10))
def test_a_stage_stored_alone_has_the_devices_to_itself(seed: int) -> None:
    """Compare `only` with a network of this stage's layers alone."""
    shapes, cuts, _ = random_network(seed)
    for s, cut in enumerate(cuts):
        only = Stages(shapes, cuts, only=s)
        alone = Stages([shapes[i] for i in cut], [range(len(cut))])
        assert only.params.local_shapes() == alone.params.local_shapes()
        assert only.params.groups(s) == alone.params.groups(0)
        assert all(only.params.groups(other) == () for other in range(len(cuts)) if other != s)


# ---- code and runs ------------------------------------------------------------------------------


def test_equal_stages_share_their_code_except_at_the_ends() -> None:
    stages = Stages(body_of_transformer(10), even_cuts(10, 5))
    assert stages.representatives == [0, 1, 1, 1, 4]


def test_stages_with_other_layers_or_inputs_run_other_code() -> None:
    small, large = Fake("a", (((2,), "float32"),)), Fake("b", (((2,), "float32"),))
    shapes = infer_shapes([small, small, large, small, small], X)
    assert Stages(shapes, even_cuts(5, 5)).representatives == [0, 1, 2, 1, 4]
    wide = Boundary(jax.ShapeDtypeStruct((4, 3), jnp.float32), {})
    for other in (wide, Boundary(X, {"a": X})):
        wider = shapes[3]._replace(boundary=other)
        assert Stages([*shapes[:3], wider, shapes[4]], even_cuts(5, 5)).representatives == [
            0,
            1,
            2,
            3,
            4,
        ]


def test_stages_of_other_chunks_run_other_code() -> None:
    stages = Stages(
        infer_shapes([Fake("a", (((2,), "float32"),))] * 9, X), even_cuts(9, 9), chunks=3
    )
    assert stages.representatives == [0, 1, 1, 3, 3, 3, 6, 6, 8]


def test_equal_neighbours_are_one_run() -> None:
    a, b = Fake("a", ()), Fake("b", ())
    shapes = infer_shapes([a, a, b, a, a, a, a], X)
    runs = Stages(shapes, [range(0, 5), range(5, 7)]).geometry.runs
    assert [(run.layer, run.start, run.count) for run in runs[0]] == [
        (a, 0, 2),
        (b, 2, 1),
        (a, 3, 2),
    ]
    assert [(run.start, run.count) for run in runs[1]] == [(0, 2)]


def test_layers_whose_output_differs_from_their_input_are_no_run() -> None:
    x = jax.ShapeDtypeStruct((2, 3), jnp.int32)
    shapes = infer_shapes([Fake("a", ())] * 3, x)  # int32 becomes float32
    assert [run.count for run in Stages(shapes, [range(3)]).geometry.runs[0]] == [1, 2]


def test_linked_layers_are_no_run() -> None:
    """Check equal layers with ties: their names are their own."""
    tied = Fake("a", (((2,), "float32"),)).tie("w", "p0")
    free = Fake("a", (((2,), "float32"),))
    runs = Stages(infer_shapes([free, free, tied, tied, tied], X), [range(5)]).geometry.runs[0]
    assert [(run.start, run.count) for run in runs] == [(0, 2), (2, 1), (3, 1), (4, 1)]


# ---- links --------------------------------------------------------------------------------------


def matrix(key: jax.Array, x: PyTree) -> dict:
    return {"w": jax.random.normal(key, (3, 3)), "b": jax.random.normal(key, (3,))}


def keep(params: dict, x: jax.Array) -> tuple:
    return jnp.tanh(x @ params["w"] + params["b"]), jnp.sin(x)


def use(params: dict, pair: tuple) -> jax.Array:
    return jnp.tanh(pair[0] @ params["w"] + params["b"]) * pair[1]


def linked_network(count: int) -> list[Layer]:
    """Return 9 + `count` layers: a skip over all, short skips, and a matrix tied three times."""
    a, b = Fake("a", (((2, 2), "float32"), ((), "float32")), counts=True), Fake("b")
    return [
        layer(matrix, keep).stash("long").tie("w", "w"),
        b,
        layer(matrix, keep).stash("short"),
        *[a] * count,
        layer(matrix, use).pop("short").tie("w", "w"),
        a,
        b,
        layer(matrix, keep).stash("short").tie("w", "w"),
        layer(matrix, use).pop("short"),
        layer(matrix, use).pop("long").tie("beta", "b"),
        Fake("c", (((3,), "float32"),)).tie("beta", "p0"),
    ]


def cut_of_links(count: int) -> list[range]:
    """Return four stages; "long" crosses the second and the third, "short" lies within them."""
    ends = [0, 2, 4 + count, 8 + count, 10 + count]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def test_passing_are_the_skips_that_a_stage_does_not_pop() -> None:
    stages = Stages(infer_shapes(linked_network(2), X), cut_of_links(2))
    assert [set(stages.geometry.input(s).skips) for s in range(4)] == [
        set(),
        {"long"},
        {"long"},
        {"long"},
    ]
    assert [stages.geometry.passing(s) for s in range(4)] == [set(), {"long"}, {"long"}, set()]


def test_tied_parameters_are_kept_with_the_first_layer_that_has_them() -> None:
    stages = Stages(infer_shapes(linked_network(2), X), cut_of_links(2), chunks=2)
    assert {name: owner.stage for name, owner in stages.ties.owners.items()} == {"w": 0, "beta": 3}
    single = Stages(infer_shapes(linked_network(2), X), [range(12)])
    assert tree_bytes([s.params for s in single.geometry.shapes]) == single.params.device_bytes()


@pytest.mark.parametrize("chunks", [1, 2])
def test_ties_are_gathered_and_their_gradients_added_at_the_owner(
    chunks: int,
) -> None:
    """Let device k add 10 (k + 1) to the gradient of "w"; the owner has the sum."""
    shapes, rng = infer_shapes(linked_network(2), X), np.random.default_rng(0)
    stages = Stages(shapes, cut_of_links(2), chunks=chunks)
    layers = [fill(shape.params, rng) for shape in shapes]
    K = stages.geometry.num_devices

    def body(params: list) -> tuple:
        local = [from_block(arrays) for arrays in params]
        shared = stages.ties.gather(local)
        part = 10.0 * (jax.lax.axis_index(STAGE) + 1)
        d_shared = {"w": jnp.full((3, 3), part), "beta": jnp.full(3, -part)}
        added = stages.ties.add(local, d_shared)
        return jax.tree.map(lambda a: a[None], shared), [to_block(arrays) for arrays in added]

    mapped = jax.shard_map(body, mesh=make_mesh(stages=K), in_specs=P(STAGE), out_specs=P(STAGE))
    shared, added = jax.device_get(jax.jit(mapped)(join(stages, layers)))
    for k in range(K):
        assert_equal(
            jax.tree.map(lambda a, k=k: a[k], shared),
            {"w": layers[0]["w"], "beta": layers[10]["b"]},
        )
    total = np.float32(10 * sum(range(1, K + 1)))
    layers[0]["w"] = layers[0]["w"] + total
    layers[10]["b"] = layers[10]["b"] - total
    assert_equal(split(stages, added), layers)


# ---- computation --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "chunks", "policy"),
    [(2, 1, "layer"), (remat.MAX_UNROLL, 2, "stage"), (remat.MAX_UNROLL + 1, 4, "stage")],
)
def test_stages_in_turn_are_the_sequential_program(count: int, chunks: int, policy: str) -> None:
    """Check unrolled and scanned layers with their parameters, statistics, links and keys."""
    layers = linked_network(count)
    shapes, rng = infer_shapes(layers, X), np.random.default_rng(0)
    stages = Stages(shapes, cut_of_links(count), chunks=chunks, remat=remat.by_name(policy))

    def draw(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda a: rng.normal(size=a.shape).astype(a.dtype), tree)

    params, stats = (
        [draw(tree) for tree in trees]
        for trees in zip(*((s.params, s.stats) for s in shapes), strict=True)
    )
    arrays, running = join(stages, params), join(stages, stats, statistics=True)
    shared = {"w": params[0]["w"], "beta": params[count + 8]["b"]}
    key, x = jax.random.key(0), jnp.ones(X.shape)
    call = Call(key, micro_batch=3, examples=None, train=True, progress=0.5, extras={})

    @jax.jit
    def staged(x: jax.Array) -> tuple[jax.Array, list]:
        boundary, moments = Boundary(x, {}), []
        for s in range(4):
            (c, k), ids = stages.geometry.at(s), jnp.asarray(stages.geometry.layer_ids())
            p, st = on_device(stages, k, arrays)[c], on_device(stages, k, running)[c]
            stage = StageStep(stages, s, p, st, NO_ARRAYS, shared, ids[k, c], call)
            boundary, seen = stage.forward(boundary)
            moments.append(seen)
        assert boundary.skips == {}
        return boundary.x, moments

    def program(x: jax.Array) -> tuple[jax.Array, list]:
        return sequential.forward(layers, params, stats, x, key, 3, train=True, progress=0.5)

    expected, expected_moments = jax.jit(program)(x)
    y, moments = staged(x)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(y, expected, rtol=1e-5)
    sums = [np.ravel(a) for a in jax.tree.leaves(moments)]
    np.testing.assert_allclose(
        np.concatenate(sums), jax.tree.leaves(expected_moments), rtol=1e-4, atol=1e-5
    )
    text = str(jax.make_jaxpr(staged)(x))
    assert ("scan[" in text) == (policy == "layer" or count > remat.MAX_UNROLL)


@pytest.mark.parametrize("count", [2, remat.MAX_UNROLL + 1])
def test_keys_of_examples_and_of_micro_batches_reach_every_layer(count: int) -> None:
    def noise(params: dict, x: jax.Array, rngs: jax.Array | None) -> jax.Array:
        return x if rngs is None else x + jax.random.normal(rngs, x.shape)

    layers = [layer(lambda key, x: {}, noise)] * count
    stages = Stages(infer_shapes(layers, X), [range(count)])
    ids = jnp.asarray(stages.geometry.layer_ids()[0])
    (params,) = on_device(stages, 0, join(stages, [{}] * count))

    def run(micro_batch: int, examples: int | None) -> np.ndarray:
        call = Call(jax.random.key(0), micro_batch, examples, True, progress=1.0, extras={})
        x = Boundary(jnp.zeros((examples or 2, 3)), {})
        stage = StageStep(stages, 0, params, params, NO_ARRAYS, {}, ids[0], call)
        return np.asarray(stage.forward(x)[0].x)

    np.testing.assert_allclose(np.concatenate([run(0, 2), run(1, 2)]), run(0, 4), rtol=1e-5)
    assert not np.allclose(run(0, None), run(1, None))
    assert np.std(run(0, 4)) > 0.5


def number(shape: LayerShape, i: jax.Array) -> PyTree:
    """Return parameters and statistics filled with the id of their layer."""
    return jax.tree.map(lambda a: jnp.full(a.shape, i, a.dtype), (shape.params, shape.stats))


@pytest.mark.parametrize("chunks", [1, 2])
def test_build_makes_every_layer_from_its_own_id(chunks: int) -> None:
    a, b = (Fake(name, (((2,), "float32"),), counts=True) for name in "ab")
    layers = [a, a, b, *[a] * (remat.MAX_UNROLL + 1)]
    cuts = [range(0, 1), range(1, 12)]  # runs of 1; of 1, 1 and 9
    stages = Stages(infer_shapes(layers, X), cuts, chunks=chunks)
    for part, storages in enumerate((stages.params, stages.stats)):

        def make(shape: LayerShape, i: jax.Array, part: int = part) -> PyTree:
            return number(shape, i)[part]

        for s, cut in enumerate(cuts):
            c, k = stages.geometry.at(s)
            build = jax.jit(functools.partial(storages.build, s, make=make))
            built = jax.device_get(build(jnp.asarray(stages.geometry.layer_ids()[k])))
            expected = [number(stages.geometry.shapes[i], jnp.asarray(i))[part] for i in cut]
            assert_equal(storages[c].split_layers(k, built), jax.device_get(expected))


@pytest.mark.parametrize("chunks", [1, 2])
def test_commit_moves_every_layers_own_statistics(chunks: int) -> None:
    """Check layers that are scanned, that are not, and that have no statistics."""
    a, b = Fake("a", counts=True), Fake("b", counts=True)
    layers = [*[a] * (remat.MAX_UNROLL + 1), Fake("none"), b, b, *[Fake("none")] * 9]
    shapes, rng = infer_shapes(layers, X), np.random.default_rng(0)
    stages = Stages(shapes, [range(0, 11), range(11, 21)], chunks=chunks)
    stats, moments = ([fill(shape.stats, rng) for shape in shapes] for _ in range(2))
    arrays, seen = (join(stages, trees, statistics=True) for trees in (stats, moments))
    for s, cut in enumerate(stages.geometry.layer_ranges):
        c, k = stages.geometry.at(s)
        local = (on_device(stages, k, arrays)[c], on_device(stages, k, seen)[c])
        new = jax.device_get(jax.jit(stages.commit, static_argnums=0)(s, *local))
        expected = [jax.tree.map(np.add, stats[i], moments[i]) for i in cut]
        assert_equal(stages.stats[c].split_layers(k, new), expected)


# ---- boundary -----------------------------------------------------------------------------------


def spec(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


RAGGED = [
    {"x": spec((2, 3)), "skip": (spec((2,)), spec((4, 1))), "ids": spec((2, 5), jnp.int32)},
    {"x": spec((2, 7)), "skip": (), "ids": spec((2, 2), jnp.int32)},
    {"x": spec((2, 2, 2)), "half": spec((3,), jnp.bfloat16), "scalar": spec(())},
]
ALIKE = [{"x": spec((2, 3)), "ids": spec((2,), jnp.int32)}] * 3


@pytest.mark.parametrize("boundaries", [RAGGED, ALIKE, RAGGED[:1], []])
def test_boundaries_survive_encoding(boundaries: list[PyTree]) -> None:
    encoding, rng = BoundaryFormat(boundaries), np.random.default_rng(0)
    for tree in boundaries:
        specs = jax.tree.leaves(tree)
        leaves = [jnp.asarray(a) for a in jax.tree.leaves(fill(tree, rng))]
        arrays = encoding.encode(leaves, specs, encoding.shapes)
        assert [(a.shape, a.dtype) for a in arrays] == [(s.shape, s.dtype) for s in encoding.shapes]
        assert_equal(encoding.decode(arrays, specs), leaves)


def test_gradients_survive_encoding_without_the_integers() -> None:
    encoding, rng = BoundaryFormat(RAGGED), np.random.default_rng(0)
    assert all(jnp.issubdtype(s.dtype, jnp.floating) for s in encoding.gradient_shapes)
    for tree in RAGGED:
        specs = [s for s in jax.tree.leaves(tree) if s.dtype != jnp.int32]
        leaves = [jnp.asarray(fill(s, rng)) for s in specs]
        arrays = encoding.encode(leaves, specs, encoding.gradient_shapes)
        assert [a.dtype for a in arrays] == [s.dtype for s in encoding.gradient_shapes]
        assert_equal(encoding.decode(arrays, specs), leaves)


def test_only_boundaries_that_differ_are_packed() -> None:
    alike, ragged = BoundaryFormat(ALIKE), BoundaryFormat(RAGGED)
    assert not alike.packed and [s.shape for s in alike.shapes] == [(2,), (2, 3)]
    assert ragged.packed
    widths = {str(s.dtype): s.shape for s in ragged.shapes}
    assert widths == {"bfloat16": (3,), "float32": (14,), "int32": (10,)}
    same_shapes_in_other_trees = BoundaryFormat([{"x": spec((2,))}, (spec((2,)),)])
    assert same_shapes_in_other_trees.packed


@pytest.mark.parametrize("boundaries", [RAGGED, ALIKE])
def test_leaves_of_another_type_or_shape_are_not_sent(boundaries: list[PyTree]) -> None:
    encoding, rng = BoundaryFormat(boundaries), np.random.default_rng(0)
    specs = jax.tree.leaves(boundaries[0])
    leaves = [jnp.asarray(a) for a in jax.tree.leaves(fill(boundaries[0], rng))]
    for wrong in (leaves[-1].astype(jnp.bfloat16), leaves[-1][:1]):
        sent = [*leaves[:-1], wrong]
        message = r"a stage sends \[.*, but the next one takes \[.*must return the shapes and types"
        with pytest.raises(ValueError, match=message):
            encoding.encode(sent, specs, encoding.shapes)
