"""Operations of a program: those of every round of its loops, on the platform it is for."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.partition.costs import measure
from gpipe_jax.partition.flops import count_flops

N = 32
SQUARE = jax.ShapeDtypeStruct((N, N), jnp.float32)
PRODUCT = 2 * N**3  # operations of one product of matrices


def times(count: int, unroll: int = 1) -> Callable:
    """Multiply x by w `count` times, in a loop."""

    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (c @ w, None), x, None, count, unroll=unroll)[0]

    return program


def nested(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 5, lambda _, c: jax.jit(times(7))(c, w), x)


def by_branch(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.cond(x[0, 0] > 0, times(6), lambda x, w: x @ w @ w, x, w)


def branch_in_a_loop(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.fori_loop(0, 3, lambda _, c: by_branch(c, w), x)


PROGRAMS = {
    "no loop": (lambda x, w: x @ w, 1),
    "one round": (times(1), 1),
    "rounds": (times(10), 10),
    "unrolled": (times(10, unroll=4), 10),
    "unrolled whole": (times(10, unroll=10), 10),
    "loop in a jit in a loop": (nested, 35),
    "loop in a remat": (jax.checkpoint(times(4)), 4),
    "loop in a branch": (by_branch, 6),
    "loop in a branch in a loop": (branch_in_a_loop, 18),
    "loop in an unrolled loop": (
        lambda x, w: jax.lax.fori_loop(0, 2, lambda _, c: times(9)(c, w), x, unroll=2),
        18,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_round_counts(name: str) -> None:
    program, products = PROGRAMS[name]
    flops = count_flops(program, (SQUARE, SQUARE), "cpu")
    assert flops == pytest.approx(products * PRODUCT, rel=0.01)


def test_without_loops_it_is_xlas_count() -> None:
    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.gelu(x @ w).sum(0)

    analysis: Any = jax.jit(program).lower(SQUARE, SQUARE).cost_analysis()
    assert count_flops(program, (SQUARE, SQUARE), "cpu") == analysis["flops"]


def test_a_loop_of_unknown_length_is_said_once() -> None:
    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c @ w, x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        counts = [count_flops(program, (SQUARE, SQUARE), "cpu") for _ in range(2)]
    assert [str(w.message)[:59] for w in caught] == [
        "the cost of a layer counts one round of a loop of unknown l"
    ]
    assert counts == pytest.approx([PRODUCT, PRODUCT], rel=0.1)


def in_a_kernel(x: jax.Array, w: jax.Array) -> jax.Array:
    def kernel(x_ref: Any, out_ref: Any) -> None:
        out_ref[...] = jnp.zeros_like(x_ref)

        def add(i: Any, _: None) -> None:
            out_ref[i, :] += x_ref[i, :]

        jax.lax.fori_loop(0, N, add, None)

    return pl.pallas_call(kernel, out_shape=SQUARE, interpret=True)(x) @ w


def in_a_shard_map(x: jax.Array, w: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((1,), ("a",), (AxisType.Auto,))

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "a"), None), x, None, 3)[0]

    return jax.shard_map(loop, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)(x) @ w


@pytest.mark.parametrize("program", [in_a_kernel, in_a_shard_map])
def test_loops_of_kernels_and_of_sharded_programs_are_left_to_xla(program: Callable) -> None:
    counted = count_flops(program, (SQUARE, SQUARE), "cpu")
    analysis: Any = jax.jit(program).lower(SQUARE, SQUARE).cost_analysis()
    assert counted == analysis["flops"] >= PRODUCT


def test_a_loop_that_writes_to_references_counts_one_round() -> None:
    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        ref = jax.new_ref(x)

        def step(_: Any, __: None) -> None:
            ref[...] = times(4)(ref[...], w)

        jax.lax.fori_loop(0, 5, step, None)
        return ref[...]

    with pytest.warns(UserWarning, match="one round of a loop whose body cannot be lowered alone"):
        counted = count_flops(program, (SQUARE, SQUARE), "cpu")
    assert counted >= PRODUCT


def test_a_recurrent_layer_costs_its_length() -> None:
    class Recurrent(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.rnn = nnx.RNN(nnx.SimpleCell(16, 16, rngs=rngs))

        def __call__(self, x: Any) -> Any:
            return self.rnn(x)

    def cost(length: int) -> float:
        x = jax.ShapeDtypeStruct((8, length, 16), jnp.float32)
        return measure(infer_shapes([layer(Recurrent)], x), "flops", "cpu")[0].compute_s

    assert cost(400) == pytest.approx(100 * cost(4), rel=0.05)


@pytest.mark.parametrize(("platform", "products"), [("cpu", 1), ("gpu", 3), ("tpu", 2)])
def test_it_is_the_platforms_program_that_counts(platform: str, products: int) -> None:
    """None of which need be there: a plan judges as the training does."""

    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        counts = {"cpu": 1, "tpu": 2, "cuda": 3, "rocm": 3}
        functions = {
            name: lambda x, w, n=n: jnp.linalg.multi_dot([x, *[w] * n])
            for name, n in counts.items()
        }
        return jax.lax.platform_dependent(x, w, **functions)

    flops = count_flops(program, (SQUARE, SQUARE), platform)
    assert flops == pytest.approx(products * PRODUCT, rel=0.01)


def test_a_loop_over_integers_has_no_floating_point_operations() -> None:
    def program(x: jax.Array, n: jax.Array) -> jax.Array:
        return x * jax.lax.while_loop(lambda i: i > 0, lambda i: i - 1, n)

    specs = (jax.ShapeDtypeStruct((4,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_flops(program, specs, "cpu") > 0
