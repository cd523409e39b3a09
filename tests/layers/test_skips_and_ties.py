"""Stash, pop and tie: their order, where shared parameters are, and every way to misuse them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.utils.trees import PyTree

X = jax.ShapeDtypeStruct((2, 3), jnp.float32)
CONTEXT = Context(jax.random.key(0), train=True)


def nothing(key: jax.Array, x: PyTree) -> dict:
    return {}


def weights(key: jax.Array, x: PyTree) -> dict:
    return {"w": jnp.ones((3, 3)), "inner": {"b": jnp.zeros(3), "c": jnp.zeros(3)}}


def one(params: dict, x: jax.Array) -> jax.Array:
    return x


def two(params: dict, x: jax.Array) -> tuple:
    return x, 10 * x


def three(params: dict, x: jax.Array) -> tuple:
    return x, 10 * x, 100 * x


def add(params: dict, pair: tuple) -> jax.Array:
    return pair[0] + pair[1]


ONE, TWO, THREE, ADD = (layer(nothing, apply) for apply in (one, two, three, add))
WEIGHTS = layer(weights, one)


def run(one: Layer, boundary: Boundary, params: PyTree = None, shared: dict | None = None) -> Any:
    """Return what passes on behind a layer."""
    return skips_and_ties.call(one, params or {}, {}, boundary, shared or {}, CONTEXT)[0]


# ---- stash and pop ------------------------------------------------------------------------------


def test_a_layer_without_links_hands_everything_on() -> None:
    waiting = {"a": 1.0, "b": 2.0}
    assert run(ONE, Boundary(5.0, waiting)) == Boundary(5.0, waiting)
    # A tuple is an output like any other.
    assert run(TWO, Boundary(5.0, waiting)) == Boundary((5.0, 50.0), waiting)


def test_stashed_tensors_wait_by_name_in_the_order_of_the_output() -> None:
    found = run(THREE.stash("b", "a"), Boundary(1.0, {"c": 3.0}))
    assert found == Boundary(1.0, {"c": 3.0, "b": 10.0, "a": 100.0})


def test_popped_tensors_come_after_the_input_in_the_order_of_the_names() -> None:
    seen = []
    see = layer(nothing, lambda params, x: seen.append(x))
    run(see.pop("b", "a"), Boundary(1.0, {"a": 10.0, "b": 20.0, "c": 30.0}))
    run(see.pop("a"), Boundary(1.0, {"a": 10.0}))
    run(see, Boundary((1.0, 2.0), {"a": 10.0}))
    assert seen == [(1.0, 20.0, 10.0), (1.0, 10.0), (1.0, 2.0)]


def test_what_is_popped_waits_no_longer() -> None:
    assert run(ADD.pop("b"), Boundary(1.0, {"a": 10.0, "b": 20.0})) == Boundary(21.0, {"a": 10.0})


def test_a_name_may_be_popped_and_stashed_again_by_one_layer() -> None:
    swap = layer(nothing, lambda params, pair: (pair[1], pair[0]))
    found = run(swap.pop("a").stash("a"), Boundary(1.0, {"a": 2.0}))
    assert found == Boundary(2.0, {"a": 1.0})
    infer_shapes([TWO.stash("a"), swap.pop("a").stash("a"), ADD.pop("a")], X)


def test_a_name_may_be_used_again_after_its_pop() -> None:
    skips_and_ties.check_names([TWO.stash("a"), ADD.pop("a")] * 2)


def test_a_stash_of_a_single_tensor_takes_a_tuple_of_two() -> None:
    shapes = infer_shapes([TWO.stash("a"), ONE, ADD.pop("a")], X)
    assert [set(s.boundary.skips) for s in shapes] == [set(), {"a"}, {"a"}]


# ---- errors of stash and pop --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [ONE, ADD.pop("a")],
            r"layer 1, add \[pop a\], pops 'a', but no layer before it stashes that, "
            r"or another has popped it; stashed at this layer: nothing",
        ),
        (
            [TWO.stash("b"), THREE.stash("c", "d"), ADD.pop("a")],
            r"layer 2, add \[pop a\], pops 'a', .*; stashed at this layer: 'b', 'c', 'd'",
        ),
        (
            [TWO.stash("a"), ADD.pop("a"), ADD.pop("a")],
            r"layer 2, .*, pops 'a', but no layer .* another has popped it",
        ),
        ([TWO.stash("a"), ADD.pop("a", "a")], r"layer 1, .*, pops 'a', but no layer .*: nothing"),
        ([ADD.pop("a"), TWO.stash("a")], r"layer 0, .*, pops 'a', but no layer before it"),
        ([ADD.pop("a").stash("a")], r"layer 0, .*, pops 'a', but no layer before it"),
        (
            [ONE, TWO.stash("a"), ONE],
            r"layer 1, two \[stash a\], stashes 'a', but no later layer pops it; "
            r"pop it, or leave the stash out",
        ),
        (
            [TWO.stash("a"), ONE, TWO.stash("a"), ADD.pop("a")],
            r"layer 2, two \[stash a\], stashes 'a', but layer 0 stashed that and no layer popped "
            r"it yet; use another name",
        ),
        ([THREE.stash("a", "a"), ADD.pop("a")], r"layer 0, .*, stashes 'a', but layer 0 stashed"),
    ],
)
def test_names_that_do_not_match_are_refused(layers: list[Layer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        skips_and_ties.check_names(layers)
    with pytest.raises(ValueError, match=message):
        infer_shapes(layers, X)


@pytest.mark.parametrize(
    ("first", "names", "given"),
    [
        (ONE, ["a"], "ShapeDtypeStruct"),
        (TWO, ["a", "b"], "a tuple of 2"),
        (THREE, ["a"], "a tuple of 3"),
        (layer(nothing, lambda params, x: [x, x]), ["a"], "list"),
        (layer(nothing, lambda params, x: {"y": x, "a": x}), ["a"], "dict"),
    ],
)
def test_an_output_without_the_stashed_tensors_is_refused(
    first: Layer, names: list[str], given: str
) -> None:
    listed = ", ".join(map(repr, names))
    message = (
        rf"layer 1, .*, stashes {listed}, so its output must be a tuple of {1 + len(names)}: "
        rf"the next layer's input, and the stashed tensors; got {given}$"
    )
    layers = [ONE, first.stash(*names), *[ADD.pop(name) for name in names]]
    with pytest.raises(ValueError, match=message):
        infer_shapes(layers, X)


def test_a_layer_that_cannot_take_what_it_pops_says_what_it_gets() -> None:
    message = r"layer 1, .*pop a\], does not take the output of layer 0.*\(float32\[2,3\], float32"
    with pytest.raises(ValueError, match=message):
        infer_shapes([TWO.stash("a"), layer(nothing, lambda p, x: x.sum()).pop("a")], X)


# ---- tied parameters ----------------------------------------------------------------------------


def test_the_first_layer_has_the_parameter_and_others_borrow_it() -> None:
    tied = WEIGHTS.tie("v", "w").tie("beta", "inner.b")
    params = {"w": 1, "inner": {"b": 2, "c": 3}}
    assert skips_and_ties.borrow(tied, params, {}) == (params, {})
    assert skips_and_ties.offered(tied, params) == {"v": 1, "beta": 2}
    own, borrowed = skips_and_ties.borrow(tied, params, {"beta": 20, "unused": 9})
    assert own == {"w": 1, "inner": {"b": None, "c": 3}} and borrowed == {"beta": 20}
    assert skips_and_ties.offered(tied, own) == {"v": 1}
    assert skips_and_ties.fill(tied, own, {"beta": 20, "v": 10}) == {
        "w": 10,
        "inner": {"b": 20, "c": 3},
    }
    assert params == {"w": 1, "inner": {"b": 2, "c": 3}}, "changed in place"


def test_a_borrowed_parameter_is_filled_in_for_the_call() -> None:
    scale = layer(weights, lambda params, x: x * params["w"]).tie("v", "w")
    assert run(scale, Boundary(2.0, {}), {"w": None}, {"v": 7.0}) == Boundary(14.0, {})


class Inner(nnx.Module):
    """Parameters at integer keys too."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layers[1](self.layers[0](x))


def test_paths_go_through_lists() -> None:
    layers = [layer(Inner).tie("w", "layers.1.kernel"), layer(Inner).tie("w", "layers.0.kernel")]
    first, second = infer_shapes(layers, X)
    assert first.borrowed == {} and second.borrowed == {"w": first.params["layers"][1]["kernel"]}
    assert second.params["layers"][0]["kernel"] is None
    assert len(jax.tree.leaves(first.params)) == 4 and len(jax.tree.leaves(second.params)) == 3


def test_names_may_be_tied_crosswise() -> None:
    tied = WEIGHTS.tie("b", "inner.b").tie("c", "inner.c")
    swapped = WEIGHTS.tie("b", "inner.c").tie("c", "inner.b")
    first, second = infer_shapes([tied, swapped], X)
    assert set(second.borrowed) == {"b", "c"} and len(jax.tree.leaves(second.params)) == 1
    assert len(jax.tree.leaves(first.params)) == 3


# ---- errors of ties -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            [ONE, WEIGHTS.tie("v", "w"), WEIGHTS],
            r"layer 1, one \[tie w as v\], ties 'v', but no other layer does; "
            r"tie the same name in another layer, or leave the tie out",
        ),
        (
            [WEIGHTS.tie("v", "inner.b").tie("v", "inner.c"), WEIGHTS.tie("v", "inner.b")],
            r"layer 0, .*, ties 'v' twice; tie it once in a layer",
        ),
        (
            [WEIGHTS.tie("v", "w"), WEIGHTS.tie("v", "w").tie("v", "w")],
            r"layer 1, .*, ties 'v' twice",
        ),
        (
            [WEIGHTS.tie("v", "w"), WEIGHTS.tie("v", "kernel")],
            r"layer 1, one \[tie kernel as v\], ties 'v' to 'kernel', which is not one of "
            r"its parameters: 'inner.b', 'inner.c', 'w'",
        ),
        ([WEIGHTS.tie("v", "inner"), WEIGHTS.tie("v", "w")], r"layer 0, .* 'inner', which is not"),
        ([WEIGHTS.tie("v", "w.x"), WEIGHTS.tie("v", "w")], r"layer 0, .* 'w.x', which is not"),
        (
            [WEIGHTS.tie("v", "w"), ONE.tie("v", "w")],
            r"layer 1, .* 'w', which is not one of its parameters: nothing",
        ),
        (
            [WEIGHTS.tie("v", "w"), WEIGHTS.tie("v", "inner.b")],
            r"layer 1, one \[tie inner.b as v\], ties 'v' to its 'inner.b' of float32\[3\], but "
            r"the first layer of that name has float32\[3, 3\]; tied parameters must have one "
            r"shape and type",
        ),
        (
            [WEIGHTS.tie("v", "w"), layer(lambda k, x: {"w": jnp.ones((3, 3), "bfloat16")}, one)
                .tie("v", "w")],
            r"layer 1, .* of bfloat16\[3, 3\], but the first layer .* has float32\[3, 3\]",
        ),
    ],
)  # fmt: skip
def test_ties_that_do_not_match_are_refused(layers: list[Layer], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_shapes(layers, X)


def test_links_are_checked_where_equal_layers_are_traced_once() -> None:
    """Check that the cache of shapes hides no error of a later, equal layer."""
    tied = WEIGHTS.tie("v", "w")
    shapes = infer_shapes([tied, tied, tied], X)
    assert [len(jax.tree.leaves(s.params)) for s in shapes] == [3, 2, 2]
    with pytest.raises(ValueError, match=r"layer 2, .*, pops 'a'"):
        infer_shapes([TWO.stash("a"), ADD.pop("a"), ADD.pop("a")], X)


def test_moments_pass_through_a_call() -> None:
    norm = layer(nnx.BatchNorm, num_features=3)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    params, stats = norm.init(CONTEXT.key, x), norm.init_statistics()
    _, moments = skips_and_ties.call(norm, params, stats, Boundary(x, {}), {}, CONTEXT)
    np.testing.assert_allclose(moments["mean"], x.mean(0), atol=1e-6)


def small_weights(key, x):
    return {"w": jax.random.normal(key, (3, 3))}


def small_matmul(params, x):
    return x @ params["w"]


def test_one_parameter_under_two_names_is_refused():
    one = layer(small_weights, small_matmul)
    layers = [one.tie("a", "w"), one.tie("a", "w").tie("b", "w"), one.tie("b", "w")]
    with pytest.raises(ValueError, match=r"layer 1, .*, ties 'w' as 'a' and as 'b'"):
        skips_and_ties.check_names(layers)
