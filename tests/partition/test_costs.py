"""Costs of layers: the flops of a dense layer, each distinct layer once, parameters apart."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpipe_jax import zoo
from gpipe_jax.distributed import processes as hosts
from gpipe_jax.distributed.mesh import abstract_mesh, is_shared, make_mesh
from gpipe_jax.layers.shape_inference import LayerShape, infer_shapes
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.losses import softmax_cross_entropy
from gpipe_jax.partition import costs as cost
from gpipe_jax.partition.costs import NOMINAL_RATES, LayerCost, measure, transfer_s
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.utils.trees import tree_bytes
from gpipe_jax.zoo.basic import Dense

B = 64


def dense_shapes(*widths: int) -> list[LayerShape]:
    return infer_shapes(zoo.mlp(widths), jax.ShapeDtypeStruct((B, widths[0]), jnp.float32))


def test_flops_of_a_dense_layer() -> None:
    """2 B I O for the forward, and as much for each of the two gradients; the gelu is small."""
    for one, (width_in, width_out) in zip(
        measure(dense_shapes(128, 256, 64, 8)[:2], "flops", "cpu"), [(128, 256), (256, 64)],
        strict=True,
    ):  # fmt: skip
        flops = one.compute_s * NOMINAL_RATES["cpu"][0]
        assert flops == pytest.approx(3 * 2 * B * width_in * width_out, rel=0.1)


def test_flops_of_a_linear_layer_count_its_forward() -> None:
    one = measure(dense_shapes(128, 256), "flops", "cpu")[0]
    assert one.compute_s * NOMINAL_RATES["cpu"][0] == pytest.approx(6 * B * 128 * 256, rel=0.1)


def test_flops_scale_with_the_layer_and_the_platforms_rate() -> None:
    small, large = (measure(dense_shapes(64, w, 8), "flops", "cpu")[0] for w in (64, 256))
    assert large.compute_s == pytest.approx(4 * small.compute_s, rel=0.1)
    tpu = measure(dense_shapes(64, 64, 8), "flops", "tpu")[0]
    ratio = NOMINAL_RATES["tpu"][0] / NOMINAL_RATES["cpu"][0]
    assert small.compute_s == pytest.approx(ratio * tpu.compute_s)
    assert measure(dense_shapes(64, 64, 8), "flops", "abacus")[0] == tpu


@pytest.mark.parametrize(
    ("kind", "function"), [("flops", "count_flops"), ("time", "_measured_time")]
)
def test_equal_layers_are_measured_once(
    kind: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {function: 0, "_working_bytes": 0}
    for name in counts:
        original = getattr(cost, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(cost, name, counted)
    costs = measure(dense_shapes(8, 16, 16, 16, 16, 4), kind, "cpu")
    assert counts == {function: 3, "_working_bytes": 3}
    assert len(costs) == 5 and costs[1] == costs[2] == costs[3]
    assert all(one.compute_s > 0 for one in costs)


def test_one_layer_on_two_inputs_is_measured_twice() -> None:
    one = layer(Dense, in_features=16, out_features=16)
    inputs = (jax.ShapeDtypeStruct((b, 16), jnp.float32) for b in (8, 64))
    small, large = measure([infer_shapes([one], x)[0] for x in inputs], "flops", "cpu")
    assert large.compute_s == pytest.approx(8 * small.compute_s, rel=0.1)


def test_bytes_of_parameters_and_output() -> None:
    first, second = measure(dense_shapes(8, 16, 4), [1, 2], "cpu")
    assert first.parameter_bytes == 4 * (8 * 16 + 16) and first.boundary_bytes == 4 * B * 16
    assert second.parameter_bytes == 4 * (16 * 4 + 4) and second.boundary_bytes == 4 * B * 4


def matrix(key: jax.Array, x: Any) -> dict:
    return {"w": jnp.ones((4, 4))}


def keep(params: dict, x: jax.Array) -> tuple:
    """Keeps eight columns, and its boolean ones."""
    return x @ params["w"], {"twice": jnp.concatenate([x, x], axis=1), "mask": x > 0}


def use(params: dict, pair: tuple) -> jax.Array:
    return pair[0] @ params["w"] + pair[1]["twice"][:, :4]


def matmul(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"]


def linked_shapes() -> list[LayerShape]:
    layers = [
        layer(matrix, keep).stash("a").tie("w", "w"),
        layer(matrix, matmul),
        layer(matrix, matmul).tie("w", "w"),
        layer(matrix, use).pop("a").tie("w", "w"),
    ]
    return infer_shapes(layers, jax.ShapeDtypeStruct((B, 4), jnp.float32))


def test_boundary_bytes_include_the_skips_that_pass() -> None:
    costs = measure(linked_shapes(), [1, 1, 1, 1], "cpu")
    x, skip = 4 * B * 4, 4 * B * 8 + B * 4
    assert [one.boundary_bytes for one in costs] == [x + skip, x + skip, x + skip, x]


def test_tied_parameters_are_held_once_and_cost_where_they_are_used() -> None:
    shapes = linked_shapes()
    for kind in ("flops", "time"):
        costs = measure(shapes, kind, "cpu")
        assert [one.parameter_bytes for one in costs] == [64, 64, 0, 0]
        assert min(one.compute_s for one in costs) > 0
    owner, free, borrower, _ = measure(shapes, "flops", "cpu")
    assert borrower.compute_s == free.compute_s
    assert borrower.working_bytes == free.working_bytes == 4 * B * 4
    assert owner.working_bytes == 4 * B * 4


def test_running_statistics_are_held_too() -> None:
    norm = layer(nnx.BatchNorm, num_features=4)
    (one,) = measure(
        infer_shapes([norm], jax.ShapeDtypeStruct((B, 4), jnp.float32)), "flops", "cpu"
    )
    assert one.parameter_bytes == 4 * (4 + 4) + 4 * (4 + 4) and one.compute_s > 0
    # Its input and what it normalised, and a few vectors.
    assert 4 * B * 4 <= one.working_bytes <= 2 * 4 * B * 4 + 10 * 4 * 4


def test_working_bytes_are_what_the_backward_keeps_without_the_parameters() -> None:
    """Keep a linear layer's input for the kernel's gradient; for a gelu a few times its output."""
    dense, linear = measure(dense_shapes(8, 256, 4), [1, 2], "cpu")
    assert linear.working_bytes == 4 * B * 256
    assert 4 * B * (8 + 256) <= dense.working_bytes <= 4 * B * (8 + 8 * 256)


def test_working_bytes_grow_with_the_micro_batch_and_parameters_do_not() -> None:
    inputs = [jax.ShapeDtypeStruct((B, 8), jnp.float32) for B in (16, 32)]
    small, large = (measure(infer_shapes(zoo.mlp((8, 32, 4)), x), [1, 1], "cpu")[0] for x in inputs)
    assert large.working_bytes == 2 * small.working_bytes > 0
    assert large.parameter_bytes == small.parameter_bytes


def test_integer_inputs_have_no_gradient_and_still_a_cost() -> None:
    shapes = infer_shapes(
        zoo.transformer_lm(vocabulary=7, length=4, width=8, heads=2, feed_forward=8, layers=1),
        jax.ShapeDtypeStruct((2, 4), jnp.int32),
    )
    for kind in ("flops", "time"):
        embedding, block, head = measure(shapes, kind, "cpu")
        assert min(embedding.compute_s, block.compute_s, head.compute_s) > 0
    assert embedding.boundary_bytes == 4 * 2 * 4 * 8


def test_given_costs_are_taken_as_they_are() -> None:
    costs = measure(dense_shapes(8, 16, 4), (3, 1.5), "cpu")
    assert [one.compute_s for one in costs] == [3.0, 1.5]


def test_all_processes_take_the_times_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes measure different times, and would cut the network in different ways.

    The times arrive with all their bits, above 2147 s (2^31 microseconds) and below 1 us too.
    """
    first, sent = [5000.1, 3.7e-8], []

    def broadcast(numbers: list[int]) -> list[int]:
        sent.append(numbers)
        return np.asarray(first).view(np.int32).tolist()

    monkeypatch.setattr(hosts, "broadcast_from_first", broadcast)
    costs = measure(dense_shapes(8, 16, 4), "time", "cpu", shared=True)
    assert [cost.compute_s for cost in costs] == first
    assert len(sent) == 1
    own = np.asarray(sent[0], np.int32).view(np.float64)
    assert len(own) == 2 and own.min() > 0 and own.max() < 60


def test_a_mesh_of_one_process_waits_for_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call no other process: it may make no pipeline."""
    monkeypatch.setattr(hosts, "broadcast_from_first", lambda _: pytest.fail("called"))
    mesh, x = make_mesh(stages=2, data=1), jnp.ones((4, 8))
    example = {"inputs": x, "labels": jnp.zeros((4,), jnp.int32)}
    layers = zoo.mlp((8, 16, 4))
    pipe = Pipeline(layers, loss=softmax_cross_entropy, mesh=mesh, example=example, cost="time")
    assert min(one.compute_s for one in pipe.costs) > 0


@pytest.mark.parametrize(
    ("processes", "shared"), [((0, 0), False), ((1, 1), False), ((0, 1), True)]
)
def test_a_mesh_is_shared_by_the_processes_of_its_devices(
    processes: tuple[int, ...], shared: bool
) -> None:
    devices = np.array([[SimpleNamespace(process_index=i)] for i in processes])
    mesh: Any = SimpleNamespace(devices=devices)
    assert is_shared(mesh) is shared
    assert not is_shared(abstract_mesh(stages=2))


@pytest.mark.parametrize("given", [[1.0], [1.0, 2.0, 3.0]])
def test_one_given_cost_for_each_layer(given: list[float]) -> None:
    message = f"`cost` has {len(given)} numbers for 2 layers; give one each"
    with pytest.raises(ValueError, match=message):
        measure(dense_shapes(8, 16, 4), given, "cpu")


def test_an_unknown_kind_of_cost_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be 'flops', 'time' or one number .* got 'vibes'"):
        measure(dense_shapes(8, 16, 4), "vibes", "cpu")


def test_a_boundary_is_sent_and_its_gradient_comes_back() -> None:
    costs = [LayerCost(1.0, 0, 0, 5_000_000), LayerCost(1.0, 0, 0, 0)]
    assert transfer_s(costs, "cpu") == [2 * 5e6 / NOMINAL_RATES["cpu"][1], 0.0]


def test_bytes_of_a_tree() -> None:
    shape = jax.ShapeDtypeStruct((3, 2), jnp.bfloat16)
    assert tree_bytes({"a": shape, "b": [np.zeros((5,), np.int64), jnp.zeros(())]}) == 12 + 40 + 4
    assert tree_bytes({}) == 0
