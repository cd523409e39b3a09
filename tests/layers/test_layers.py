"""Layer descriptions as values, what they make, their randomness; and the Transformer's parts."""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from paths import TESTS

from gpipe_jax import sequential, zoo
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.zoo.basic import Dense
from gpipe_jax.zoo.transformer.attention import CausalAttention
from gpipe_jax.zoo.transformer.layers import Block, Embedding, LanguageHead

KEYS = [jax.random.key(seed) for seed in range(3)]


def apply(one: Layer, params: Any, x: Any, key: jax.Array, *, train: bool = True) -> jax.Array:
    """Return the output of a layer that has no statistics."""
    y, moments = one.apply(params, {}, x, Context(key, train))
    assert moments == {}
    return y


run = jax.jit(apply, static_argnums=0, static_argnames="train")


@functools.partial(jax.jit, static_argnums=0)
def make(one: Layer, key: jax.Array, x: jax.Array) -> Any:
    return one.init(key, x)


class Scale(nnx.Module):
    """No `rngs` at all; kwargs that are lists."""

    def __init__(self, factors: tuple, name: str = "s") -> None:
        self.factors, self.name = factors, name

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * sum(f for pair in self.factors for f in pair)


class OtherScale(Scale):
    """Be equal but for the class."""


class DropAtCall(nnx.Module):
    """Dropout whose randomness comes with the call."""

    def __init__(self) -> None:
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        return self.drop(x, rngs=rngs)


class DropOwn(nnx.Module):
    """Two dropouts with streams of their own: their masks must differ from each other."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.tens, self.units = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return 10 * self.tens(x) + self.units(x)


class Counting(nnx.Module):
    """Holds a variable that nothing knows how to carry from step to step."""

    def __init__(self) -> None:
        self.calls = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        return x


class Fading(nnx.Module):
    """Becomes weaker with the training run."""

    def __call__(self, x: jax.Array, *, progress: jax.Array | float) -> jax.Array:
        return (1 - progress) * x


def affine_init(key: jax.Array, x: jax.Array) -> dict:
    return {"w": jax.random.normal(key, (x.shape[-1], 2)), "b": jnp.ones(2)}


def affine_apply(params: dict, x: jax.Array) -> jax.Array:
    return x @ params["w"] + params["b"][None]


def noise_apply(params: dict, x: jax.Array, rngs: jax.Array) -> jax.Array:
    return affine_apply(params, x) + jax.random.normal(rngs, (1, 2))


def told_apply(params: dict, x: jax.Array, rngs: Any, train: bool, progress: Any) -> dict:
    """Return every argument that a pair of functions may take."""
    return {"rngs": rngs, "train": train, "progress": progress}


# ---- descriptions -------------------------------------------------------------------------------


def test_descriptions_are_compared_by_value() -> None:
    one = layer(Dense, in_features=4, out_features=3)
    assert one == layer(Dense, out_features=3, in_features=4)
    assert hash(one) == hash(layer(Dense, out_features=3, in_features=4))
    assert one != layer(Dense, in_features=4, out_features=5)
    assert one != layer(Dense, in_features=4, out_features=3, last=False)
    assert layer(Scale, factors=()) != layer(OtherScale, factors=())
    assert str(one) == "Dense(in_features=4, out_features=3)"


def test_long_arguments_are_printed_as_their_type() -> None:
    assert str(layer(Scale, factors=((1, 2), (3,)))) == "Scale(factors=((1, 2), (3,)))"
    assert str(layer(Scale, factors=((1, 2),) * 9, name="t")) == "Scale(factors=tuple, name=t)"


def test_lists_among_the_arguments_are_frozen() -> None:
    one = layer(Scale, factors=[[1, 2], [3]])
    assert one == layer(Scale, factors=((1, 2), (3,))) and hash(one) is not None
    x = jnp.ones((2, 2))
    assert one.init(KEYS[0], x) == {}
    np.testing.assert_array_equal(apply(one, {}, x, KEYS[0], train=True), 6 * x)


def test_a_description_holds_no_arrays_and_runs_no_code() -> None:
    built = []

    class Loud(nnx.Module):
        def __init__(self) -> None:
            built.append(self)

    described = layer(Loud)
    assert not built and not jax.tree.leaves(described.kwargs)  # type: ignore[attr-defined]


def test_a_pair_of_functions_is_a_layer() -> None:
    one, x = layer(affine_init, affine_apply), jnp.arange(6.0).reshape(2, 3)
    assert one == layer(affine_init, affine_apply) != layer(affine_init, noise_apply)
    assert str(one) == "affine_apply"
    params = one.init(KEYS[0], x)
    assert jax.tree.map(jnp.shape, params) == {"w": (3, 2), "b": (2,)}
    for train in (True, False):
        y = apply(one, params, x, KEYS[1], train=train)
        np.testing.assert_array_equal(y, x @ params["w"] + 1)


def test_a_pair_that_takes_rngs_gets_the_key() -> None:
    one, x = layer(affine_init, noise_apply), jnp.ones((2, 3))
    params = one.init(KEYS[0], x)
    wanted = noise_apply(params, x, KEYS[1])
    np.testing.assert_array_equal(apply(one, params, x, KEYS[1], train=True), wanted)
    assert not np.allclose(apply(one, params, x, KEYS[2], train=True), wanted)


class LinenDropout(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(8)(x), rng=self.make_rng())


def test_linen_modules_are_pairs_of_bound_methods() -> None:
    dense, x = nn.Dense(3), jnp.arange(8.0).reshape(2, 4)
    one = layer(dense.init, dense.apply)
    assert one == layer(dense.init, dense.apply) and str(one) == "Dense"
    params = one.init(KEYS[0], x)
    y = apply(one, params, x, KEYS[1], train=True)
    np.testing.assert_allclose(y, x @ params["params"]["kernel"], rtol=1e-6)


def test_linen_modules_draw_from_the_key() -> None:
    module, x = LinenDropout(), jnp.ones((4, 4))
    one = layer(module.init, module.apply)
    params = one.init(KEYS[0], x)
    first, again, other = (apply(one, params, x, KEYS[i], train=True) for i in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_functions_without_a_name_can_be_printed() -> None:
    assert "affine_apply" in str(layer(affine_init, functools.partial(affine_apply)))


@pytest.mark.parametrize("target", [5, "Dense", affine_init, int, nn.Dense])
def test_what_is_no_module_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match=r"takes a flax.nnx.Module class .* two functions"):
        layer(target)


def test_a_function_that_returns_layers_goes_to_the_pipeline() -> None:
    with pytest.raises(TypeError, match=r"got <function mlp .*call it and give the list to Pipel"):
        layer(zoo.mlp)
    with pytest.raises(TypeError) as refusal:
        layer(5)
    assert "Pipeline" not in str(refusal.value)


@pytest.mark.parametrize("value", [{"a": 1}, {1, 2}, np.ones(2), [[{}]]])
def test_unhashable_arguments_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"must be hashable.*Scale\(factors=.*unhashable type"):
        layer(Scale, factors=value)


def test_functions_take_no_keywords() -> None:
    with pytest.raises(TypeError, match=r"takes no keywords, got \['width'\]"):
        layer(affine_init, affine_apply, width=3)


@pytest.mark.parametrize("train", [True, False])
def test_calls_that_change_other_variables_are_refused(train: bool) -> None:
    message = r"a call changes the array `calls` of Counting, .* leave the array as it is"
    with pytest.raises(ValueError, match=message):
        apply(layer(Counting), {}, jnp.ones((2, 4)), KEYS[0], train=train)


# ---- links: what a layer stashes, pops and ties -------------------------------------------------


def test_links_make_another_layer_and_leave_the_first_as_it_was() -> None:
    one = layer(Dense, in_features=4, out_features=3)
    linked = one.stash("a").stash("b", "c").pop("d").pop("e").tie("w", "linear.kernel")
    assert linked.stashes == ("a", "b", "c") and linked.pops == ("d", "e")
    assert linked.ties == (("linear.kernel", "w"),)
    assert (one.stashes, one.pops, one.ties) == ((), (), ())
    assert type(linked) is type(one)


@pytest.mark.parametrize("method", ["stash", "pop", "read"])
def test_a_list_of_names_is_refused(method: str) -> None:
    one = layer(nnx.Linear, in_features=3, out_features=3)
    message = rf"{method}\(\) takes names, .* got \['a', 'b'\]; write .{method}\('a', 'b'\)"
    with pytest.raises(TypeError, match=message):
        getattr(one, method)(["a", "b"])


def test_links_belong_to_the_value() -> None:
    pairs = [layer(Dense, in_features=4, out_features=3), layer(affine_init, affine_apply)]
    for one in pairs:
        others = [one.stash("a"), one.pop("a"), one.tie("a", "w"), one.stash("b")]
        assert len({one, *others}) == 5
        assert one.stash("a") == one.stash("a") != one


def test_links_are_printed() -> None:
    one = layer(affine_init, affine_apply)
    linked = one.stash("a", "b").pop("c").tie("t", "w").tie("u", "b")
    assert str(linked) == "affine_apply [stash a, b] [pop c] [tie w as t, b as u]"
    assert str(layer(Scale, factors=((1,),)).pop("c")) == "Scale(factors=((1,),)) [pop c]"


# ---- what layers are told -----------------------------------------------------------------------


def test_a_pair_is_told_what_it_asks_for() -> None:
    one, x = layer(affine_init, told_apply), jnp.ones((2, 3))
    told, moments = one.apply({}, {}, x, Context(KEYS[1], train=True, progress=0.25))
    assert told == {"rngs": KEYS[1], "train": True, "progress": 0.25} and moments == {}
    told, moments = one.apply({}, {}, x, Context(KEYS[1], train=False))
    assert told == {"rngs": None, "train": False, "progress": 1.0} and moments == {}


def test_a_module_is_told_the_progress_of_training() -> None:
    y, _ = layer(Fading).apply({}, {}, jnp.ones(2), Context(KEYS[1], train=True, progress=0.25))
    np.testing.assert_array_equal(y, [0.75, 0.75])


def test_a_layer_without_statistics_has_none_to_commit() -> None:
    for one in (layer(DropOwn), layer(Dense, in_features=4, out_features=3)):
        assert one.init_statistics() == {} == one.commit({}, {})
    assert layer(affine_init, affine_apply).init_statistics() == {}


# ---- what layers make ---------------------------------------------------------------------------


def test_parameters_are_a_plain_tree_of_what_the_module_has() -> None:
    one = layer(Dense, in_features=6, out_features=3, last=True)
    params = one.init(KEYS[0], jnp.ones((2, 6)))
    module = Dense(6, 3, True, rngs=nnx.Rngs(KEYS[0]))
    assert type(params) is dict and type(params["linear"]) is dict
    np.testing.assert_array_equal(params["linear"]["kernel"], module.linear.kernel[...])
    x = jnp.arange(12.0).reshape(2, 6)
    np.testing.assert_allclose(apply(one, params, x, KEYS[1], train=True), module(x), rtol=1e-6)


@pytest.mark.parametrize(
    "one",
    [
        layer(Dense, in_features=6, out_features=3),
        layer(affine_init, affine_apply),
        layer(nn.Dense(3).init, nn.Dense(3).apply),
        layer(DropOwn),
    ],
    ids=str,
)
def test_shapes_are_those_of_what_is_made(one: Layer) -> None:
    x = jnp.ones((2, 6))
    params, stats = one.shapes(jax.ShapeDtypeStruct(x.shape, x.dtype))
    made = (one.init(KEYS[0], x), one.init_statistics())
    assert jax.tree.structure((params, stats)) == jax.tree.structure(made)
    for a, b in zip(jax.tree.leaves((params, stats)), jax.tree.leaves(made), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct) and (a.shape, a.dtype) == (b.shape, b.dtype)


def test_parameters_depend_on_the_key() -> None:
    one, x = layer(Dense, in_features=6, out_features=3), jnp.ones((2, 6))
    first, again, other = (one.init(KEYS[i], x)["linear"]["kernel"] for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("module", [DropAtCall, DropOwn])
def test_dropout_is_a_function_of_the_key(module: type[nnx.Module]) -> None:
    one, x = layer(module), jnp.ones((8, 8))
    assert one.init(KEYS[0], x) == {}

    def draw(i: int) -> np.ndarray:
        return np.asarray(apply(one, {}, x, KEYS[i]))

    np.testing.assert_array_equal(draw(1), draw(1))
    np.testing.assert_array_equal(draw(1), run(one, {}, x, KEYS[1]))
    assert not np.array_equal(draw(1), draw(2))
    assert set(np.unique(draw(1))) <= {0, 2, 20, 22}


def test_streams_of_one_module_are_independent() -> None:
    y = np.asarray(apply(layer(DropOwn), {}, jnp.ones((8, 8)), KEYS[1]))
    assert set(np.unique(y)) == {0, 2, 20, 22}


@pytest.mark.parametrize("module", [DropAtCall, DropOwn])
def test_dropout_is_off_in_evaluation(module: type[nnx.Module]) -> None:
    x = jnp.ones((8, 8))
    y = apply(layer(module), {}, x, KEYS[1], train=False)
    np.testing.assert_array_equal(y, x if module is DropAtCall else 11 * x)


STATIC_GRAPHS = """
import jax, jax.numpy as jnp
from gpipe_jax import zoo, sequential, losses
from gpipe_jax.layers.shape_inference import infer_shapes
text = zoo.transformer_lm(
    vocabulary=5, length=4, width=4, heads=2, feed_forward=4, layers=1, dropout=0.5
)
for layers, shape in ((text, (2, 4)), (zoo.convnet((4,), (1,)), (2, 4, 4, 1))):
    x = jnp.zeros(shape, jnp.int32 if len(shape) == 2 else jnp.float32)
    labels = jnp.zeros(shape if len(shape) == 2 else (2,), jnp.int32)
    step = sequential.value_and_grad(layers, losses.softmax_cross_entropy)
    batch = {"inputs": x, "labels": labels, "weights": jnp.ones(2)}
    shapes = infer_shapes(layers, x)
    params, stats = [s.params for s in shapes], [s.stats for s in shapes]
    (loss, _), grads, _ = jax.eval_shape(step, params, stats, batch, jax.random.key(0))
    assert loss.shape == () and len(grads) == len(layers)
from test_layers import DropOwn, layer, run
y = run(layer(DropOwn), {}, jnp.ones((8, 8)), jax.random.key(1))
assert set(y.flatten().tolist()) == {0, 2, 20, 22}
from flax import config
assert config.nnx_graph_mode is config.nnx_graph_updates is False
print("fine")
"""


def test_layers_work_without_nnx_graph_mode() -> None:
    """Flax's announced default."""
    off = {"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false", "JAX_PLATFORMS": "cpu"}
    path = os.pathsep.join(map(str, [TESTS, TESTS / "layers"]))
    result = subprocess.run(
        [sys.executable, "-c", STATIC_GRAPHS],
        env={**os.environ, **off, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "fine\n", result.stderr


# ---- Transformer --------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[], Layer]] = {
    "attention": lambda: layer(CausalAttention, width=8, heads=2),
    "block": lambda: layer(Block, width=8, heads=2, feed_forward=6),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_each_position_sees_itself_and_all_before_it_and_none_after(name: str) -> None:
    """|d output[i] / d input[j]|, summed over features: > 0 for j <= i and exactly 0 for j > i."""
    one, x = BLOCKS[name](), jax.random.normal(KEYS[0], (1, 6, 8))
    params = make(one, KEYS[1], x)
    jacobian = jax.jit(jax.jacobian(lambda x: run(one, params, x, KEYS[2])))(x)
    sees = np.abs(jacobian[0, :, :, 0]).sum((1, 3))  # [output position, input position]
    assert (sees[np.tril_indices(6)] > 1e-4).all()
    np.testing.assert_array_equal(np.triu(sees, 1), 0)


def test_the_whole_language_model_is_causal() -> None:
    layers = zoo.transformer_lm(
        vocabulary=7, length=6, width=8, heads=2, feed_forward=8, layers=2, dropout=0.0
    )
    tokens = jnp.asarray([[0, 1, 2, 3, 4, 5]])
    params, stats = jax.jit(lambda: sequential.init(layers, tokens))()
    scores = jax.jit(
        lambda t: sequential.forward(layers, params, stats, t, KEYS[0], train=False)[0]
    )
    before, after = np.asarray(scores(tokens)), np.asarray(scores(tokens.at[0, 3].set(6)))
    np.testing.assert_array_equal(before[0, :3], after[0, :3])
    assert (np.abs(before - after)[0, 3:].max(axis=-1) > 1e-5).all()


def test_positions_matter() -> None:
    one = layer(Embedding, vocabulary=5, length=4, width=8)
    tokens = jnp.zeros((2, 3), jnp.int32)
    params = make(one, KEYS[0], tokens)
    y = np.asarray(run(one, params, tokens, KEYS[0], train=True))
    assert y.shape == (2, 3, 8) and not np.allclose(y[0, 0], y[0, 1])
    np.testing.assert_array_equal(y[0], y[1])


def test_bfloat16_layers_compute_in_bfloat16_and_keep_float32_parameters() -> None:
    layers = zoo.transformer_lm(
        vocabulary=7, length=4, width=8, heads=2, feed_forward=8, layers=1, dtype="bfloat16"
    )
    shapes = infer_shapes(layers, jax.ShapeDtypeStruct((2, 4), jnp.int32))
    assert [s.output.dtype for s in shapes] == [jnp.bfloat16] * 3
    assert {p.dtype for s in shapes for p in jax.tree.leaves(s.params)} == {jnp.dtype("float32")}
    assert shapes[-1].layer == layer(LanguageHead, width=8, vocabulary=7, dtype="bfloat16")


def test_block_dropout_acts_in_training_only() -> None:
    one = layer(Block, width=8, heads=2, feed_forward=6, dropout=0.5)
    still = layer(Block, width=8, heads=2, feed_forward=6)

    @jax.jit
    def outputs(x: jax.Array) -> list[jax.Array]:
        params = one.init(KEYS[1], x)
        cases = ((still, True), (one, False), (one, True))
        return [apply(layer, params, x, KEYS[2], train=train) for layer, train in cases]

    wanted, evaluated, trained = outputs(jax.random.normal(KEYS[0], (2, 3, 8)))
    np.testing.assert_allclose(evaluated, wanted, rtol=1e-6)
    assert not np.allclose(trained, wanted)
