"""Check the rectangular form of ragged stages: nothing is lost or mixed up, and little wasted."""

import functools
import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_batch, network

import gpipe_jax as gpipe
from gpipe_jax.pipeline.ragged import packing
from gpipe_jax.pipeline.ragged.packing import SLOT_SLACK
from gpipe_jax.pipeline.ragged.storage import Storage, from_block, to_block
from gpipe_jax.utils.trees import PyTree, tree_bytes

Stage = list[tuple[int, bool, PyTree]]  # runs: (number of layers, scanned, tree of one layer)

DTYPES = ("float32", "bfloat16", "float16")
SEEDS = range(40)


def random_stages(seed: int, dtypes: tuple[str, ...] = DTYPES) -> list[Stage]:
    """Return 1 to 6 stages of 0 to 5 runs.

    Trees have 0 to 3 leaves of rank 0 to 2; many are repeated. Some have a None, as in place of a
    borrowed parameter.
    """
    rng = random.Random(seed)

    def leaf() -> jax.ShapeDtypeStruct:
        shape = tuple(rng.randint(1, 4) for _ in range(rng.randint(0, 2)))
        return jax.ShapeDtypeStruct(shape, np.dtype(rng.choice(dtypes)))

    def tree() -> PyTree:
        leaves = {f"p{i}": leaf() for i in range(rng.randint(0, 3))}
        return {**leaves, "borrowed": None} if rng.random() < 0.3 else leaves

    palette = [tree() for _ in range(4)]

    def run() -> tuple[int, bool, PyTree]:
        return rng.randint(1, 4), rng.random() < 0.5, rng.choice(palette)

    return [[run() for _ in range(rng.randint(0, 5))] for _ in range(rng.randint(1, 6))]


def fill(tree: PyTree, rng: np.random.Generator) -> PyTree:
    """Return small integers, exact in every dtype, and none of them zero."""
    return jax.tree.map(
        lambda a: (rng.integers(1, 100, a.shape) * rng.choice((-1, 1), a.shape)).astype(a.dtype),
        tree,
    )


def filled(stage: Stage, rng: np.random.Generator) -> list[PyTree]:
    """Return a tree for each layer of a stage."""
    return [fill(tree, rng) for count, _, tree in stage for _ in range(count)]


def shapes_of(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def assert_equal(actual: PyTree, expected: PyTree) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(a, b)


def test_the_random_stages_cover_all_forms() -> None:
    """Check that the tests below see slots and packs, scanned and other runs, and empty stages."""
    storages = [Storage(random_stages(seed)) for seed in SEEDS]
    places = [p for s in storages for groups in s.groups for g in groups for p in g.places]
    assert {p.slot is None for p in places} == {True, False}
    assert {g.scanned for s in storages for groups in s.groups for g in groups} == {True, False}
    assert any(not groups for s in storages for groups in s.groups)
    assert any(len(s.packs) == 3 for s in storages) and any(len(s.slots) > 3 for s in storages)


@pytest.mark.parametrize("seed", SEEDS)
def test_layers_survive_the_rectangular_form(seed: int) -> None:
    stages, rng = random_stages(seed), np.random.default_rng(seed)
    storage = Storage(stages)
    for k, stage in enumerate(stages):
        layers = filled(stage, rng)
        arrays = storage.join_layers(k, layers)
        assert shapes_of(arrays) == storage.local_shapes()  # the same on every device
        assert_equal(storage.split_layers(k, arrays), layers)


@pytest.mark.parametrize("seed", SEEDS)
def test_read_gives_runs_and_write_inverts_it(seed: int) -> None:
    """Check that a scanned run is one tree of arrays [n, ...], any other a list of n trees."""
    stages, rng = random_stages(seed), np.random.default_rng(seed)
    storage = Storage(stages)
    for k, stage in enumerate(stages):
        layers = filled(stage, rng)
        expected, rest = [], layers
        for count, scanned, _ in stage:
            run, rest = rest[:count], rest[count:]
            expected.append(jax.tree.map(lambda *a: np.stack(a), *run) if scanned else run)
        arrays = storage.join_layers(k, layers)
        assert_equal(storage.read(k, arrays), expected)
        assert_equal(storage.write(k, storage.read(k, arrays), np), arrays)


def test_read_and_write_under_jit_are_those_of_numpy() -> None:
    for seed in (3, 5):
        stages, rng = random_stages(seed), np.random.default_rng(0)
        storage = Storage(stages)
        for k, stage in enumerate(stages):
            arrays = storage.join_layers(k, filled(stage, rng))
            again = jax.jit(lambda p, k=k, s=storage: s.write(k, s.read(k, p)))(arrays)
            assert_equal(jax.device_get(again), arrays)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("seed", SEEDS[::10])
def test_reading_and_adding_touches_one_layer(seed: int, traced: bool) -> None:
    """Check an index of the layer that is a number, and one that is traced, as in a scan."""
    stages, rng = random_stages(seed), np.random.default_rng(seed)
    storage = Storage(stages)
    for k, stage in enumerate(stages):
        layers, start = filled(stage, rng), 0
        for r, (count, _, _) in enumerate(stage):
            arrays, i = storage.join_layers(k, layers), count - 1
            more = jax.tree.map(lambda a: fill(a, rng), layers[start + i])

            def both(i: Any, arrays: dict, more: PyTree, k: int = k, r: int = r) -> tuple:
                read = storage.read_layer(k, r, i, arrays)
                return read, storage.add(k, r, i, arrays, more)

            run = jax.jit(both) if traced else functools.partial(jax.jit(both, static_argnums=0))
            read, changed = jax.device_get(run(i, arrays, more))
            assert_equal(read, layers[start + i])
            layers[start + i] = jax.tree.map(np.add, layers[start + i], more)
            assert_equal(changed, storage.join_layers(k, layers))
            start += count


@pytest.mark.parametrize("seed", SEEDS[::10])
def test_adding_to_a_run_as_a_whole(seed: int) -> None:
    stages, rng = random_stages(seed), np.random.default_rng(seed)
    storage = Storage(stages)
    for k, stage in enumerate(stages):
        layers, start = filled(stage, rng), 0
        for r, (count, _, _) in enumerate(stage):
            arrays, part = storage.join_layers(k, layers), slice(start, start + count)
            more = [jax.tree.map(lambda a: fill(a, rng), tree) for tree in layers[part]]
            stacked = jax.tree.map(lambda *a: np.stack(a), *more)
            assert_equal(
                storage.read_run(k, r, arrays), jax.tree.map(lambda *a: np.stack(a), *layers[part])
            )
            changed = storage.add(k, r, None, jax.tree.map(jnp.asarray, arrays), stacked)
            layers[part] = [
                jax.tree.map(np.add, *pair) for pair in zip(layers[part], more, strict=True)
            ]
            assert_equal(jax.device_get(changed), storage.join_layers(k, layers))
            start += count


# ---- one leaf -----------------------------------------------------------------------------------


def single_leaves(stages: list[Stage]) -> list[tuple[int, int, int]]:
    """Return (stage, run, leaf) of each run of a single layer that is not scanned."""
    return [
        (k, r, i)
        for k, stage in enumerate(stages)
        for r, (count, scanned, tree) in enumerate(stage)
        for i in range(len(jax.tree.leaves(tree)))
        if count == 1 and not scanned
    ]


def test_read_leaf_and_add_leaf_touch_one_leaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check slots and packs; all other leaves stay as they are."""
    monkeypatch.setattr(packing, "SLOT_SLACK", 0.05)  # for some of each
    in_slot = []
    for seed in SEEDS:
        stages, rng = random_stages(seed), np.random.default_rng(seed)
        storage = Storage(stages)
        for k, r, i in single_leaves(stages):
            arrays = storage.join_layers(k, filled(stages[k], rng))
            place = storage.groups[k][r].places[i]
            runs = storage.read(k, arrays)
            old = jax.tree.leaves(runs[r][0])
            assert_equal(storage.read_leaf(place, arrays), old[i])
            more = fill(old[i], rng)
            changed = storage.add_leaf(place, jax.tree.map(jnp.asarray, arrays), jnp.asarray(more))
            new = [*old[:i], old[i] + more, *old[i + 1 :]]
            runs[r] = [jax.tree.unflatten(jax.tree.structure(runs[r][0]), new)]
            assert_equal(jax.device_get(changed), storage.write(k, runs, np))
            in_slot.append(place.slot is not None)
    assert in_slot.count(True) > 20 and in_slot.count(False) > 20


# ---- slots and packs ----------------------------------------------------------------------------


def spec(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.dtype(dtype))


def test_stages_alike_are_slots_without_padding() -> None:
    tree = {"kernel": spec(8, 8), "bias": spec(8)}
    storage = Storage([[(2, True, tree)], [(2, False, tree)], [(2, True, tree)]])
    assert storage.packs == [] and {slot.depth for slot in storage.slots} == {2}
    assert storage.device_bytes() == 4 * 2 * (8 * 8 + 8)


def test_leaves_of_one_shape_in_a_stage_have_slots_of_their_own() -> None:
    tree = {"a": spec(4), "b": spec(4)}
    storage = Storage([[(1, False, tree), (3, True, tree)], [(1, False, tree), (3, True, tree)]])
    assert sorted(slot.depth for slot in storage.slots) == [1, 1, 3, 3]
    slots = [place.slot for group in storage.groups[0] for place in group.places]
    assert sorted(s for s in slots if s is not None) == [0, 1, 2, 3]


def test_stages_unlike_are_packed_to_the_largest() -> None:
    """Check that a pack holds the 10 elements of stage 1; slots would hold 9 + 4 + 6."""
    storage = Storage(
        [[(1, False, [spec(9)])], [(1, False, [spec(2, 2)]), (2, True, [spec(3)])], []]
    )
    assert storage.slots == [] and storage.packs == [spec(10)]
    offsets = [place.offset for group in storage.groups[1] for place in group.places]
    assert offsets == [0, 4]


def test_slots_cost_no_more_than_their_slack() -> None:
    """Check that a large leaf of all stages gets a slot, though one stage has another leaf."""
    large = (1, False, [spec(1000)])
    little = Storage([[large], [large, (1, False, [spec(7)])]])
    assert [slot.shape for slot in little.slots][:1] == [(1000,)]
    only_one = Storage([[large], [(1, False, [spec(20, 50)])]])
    assert only_one.slots == [] and only_one.packs == [spec(1000)]


def test_packs_are_one_for_each_type() -> None:
    mixed = [[spec(30, dtype=jnp.bfloat16), spec(20)], [spec(20, dtype=jnp.bfloat16), spec(30)]]
    storage = Storage([[(1, False, tree)] for tree in mixed])
    assert storage.slots == []
    assert storage.packs == [spec(30, dtype=jnp.bfloat16), spec(30)]
    arrays = storage.join_layers(0, [[np.ones(30, jnp.bfloat16), np.full(20, 7, np.float32)]])
    assert [a.tolist() for a in arrays["packs"]] == [[1] * 30, [7] * 20 + [0] * 10]


@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES])
@pytest.mark.parametrize("seed", SEEDS)
def test_padding_is_at_most_that_of_packing_everything_and_the_slack(
    seed: int, dtypes: tuple[str, ...]
) -> None:
    stages = random_stages(seed, dtypes)
    own: dict[Any, list[int]] = {}  # bytes of each stage, by dtype
    for k, stage in enumerate(stages):
        for count, _, tree in stage:
            for a in jax.tree.leaves(tree):
                own.setdefault(a.dtype, [0] * len(stages))[k] += count * tree_bytes([a])
    packed = sum(max(of_stage) for of_stage in own.values())
    assert Storage(stages).device_bytes() <= packed * (1 + SLOT_SLACK)


@pytest.mark.parametrize("seed", SEEDS)
def test_bytes_are_those_of_the_arrays(seed: int) -> None:
    stages = random_stages(seed)
    storage = Storage(stages)
    own = [sum(count * tree_bytes(tree) for count, _, tree in stage) for stage in stages]
    assert storage.device_bytes() == tree_bytes(storage.local_shapes()) >= max(own)


def test_one_stage_holds_its_trees_and_nothing_else() -> None:
    for seed in SEEDS:
        stage = random_stages(seed)[0]
        own = sum(count * tree_bytes(tree) for count, _, tree in stage)
        assert Storage([stage]).device_bytes() == own


def test_trees_without_leaves_need_no_arrays() -> None:
    storage = Storage([[(3, True, {}), (1, False, {"borrowed": None})], []])
    arrays = storage.join_layers(0, [{}, {}, {}, {"borrowed": None}])
    assert arrays == {"slots": [], "packs": []} and storage.device_bytes() == 0
    assert storage.split_layers(0, arrays) == [{}, {}, {}, {"borrowed": None}]


def test_a_device_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that slots have an axis for the devices, and that packs lie end to end."""
    monkeypatch.setattr(packing, "SLOT_SLACK", 0.05)  # for some of each
    stages, rng = random_stages(3), np.random.default_rng(0)
    storage = Storage(stages)
    each = [storage.join_layers(k, filled(stage, rng)) for k, stage in enumerate(stages)]
    blocks = [to_block(arrays) for arrays in each]
    assert len(each) > 1 and storage.slots and storage.packs
    for block, arrays in zip(blocks, each, strict=True):
        assert_equal(from_block(block), arrays)
        assert all(a.shape[0] == 1 for a in block["slots"])
        assert all(a.ndim == 1 for a in block["packs"])


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_shapes_of_all_devices_are_those_of_a_fresh_state(chunks: int) -> None:
    pipe = gpipe.Pipeline(
        network("pytree_mlp"),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2),
        micro_batches=2,
        schedule="interleaved",
        chunks=chunks,
        example=make_batch("pytree_mlp", 4),
    )

    def shape(a: Any) -> tuple:
        return a.shape, a.dtype, a.sharding

    expected = jax.tree.map(shape, pipe.init(0))
    assert jax.tree.map(shape, pipe.abstract_arguments()[0]) == expected
