"""Divide an nnx model into layers with its values, and get a model of trained values back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers import leaf_names
from gpipe_jax.layers.layer import Context
from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.layers.sources.from_module import to_module

WIDTH, LENGTH, WORDS = 8, 6, 12
KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, WORDS, (8, LENGTH)).astype(np.int32)
BATCH = {"inputs": TOKENS, "labels": np.roll(TOKENS, -1, 1)}


class Rotary(nnx.Module):
    """Turn pairs of features by the position: its tables are constants."""

    def __init__(self) -> None:
        angles = jnp.arange(LENGTH)[:, None] * 0.5 ** jnp.arange(WIDTH // 2)
        self.sin, self.cos = jnp.sin(angles), nnx.Variable(jnp.cos(angles))

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = jnp.split(x, 2, axis=-1)
        cos = self.cos[...]
        return jnp.concatenate([a * cos - b * self.sin, a * self.sin + b * cos], -1)


class Block(nnx.Module):
    """Attend to the tokens before."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.rotary = Rotary()
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
        scores = self.rotary(q) @ self.rotary(k).swapaxes(-1, -2) / WIDTH**0.5
        scores = jnp.where(jnp.tri(LENGTH, dtype=bool), scores, -1e9)
        return x + self.up(jax.nn.softmax(scores) @ v)


class Decoder(nnx.Module):
    """Predict the next token; the table of tokens is used twice."""

    def __init__(self, depth: int = 3, *, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(depth)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def head(norm: nnx.Module, embed: nnx.Embed, x: jax.Array) -> jax.Array:
    """Return the scores of the tokens."""
    return embed.attend(norm(x))


# --- the conversion of the decoder ---
BLOCKS = ["embed", "blocks", ("norm", "embed", head)]
# --- end ---


def build(layers: list, stages: int, replicas: int = 1, **options: Any) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        layers,
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=stages, data=replicas),
        example=BATCH,
        micro_batches=2,
        **options,
    )


def loss_and_gradients(model: nnx.Module) -> tuple[jax.Array, dict]:
    """Return the loss and the gradients of the plain model."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State) -> jax.Array:
        scores = jax.nn.log_softmax(nnx.merge(graph, params, rest)(jnp.asarray(TOKENS)))
        return -jnp.take_along_axis(scores, jnp.asarray(BATCH["labels"])[..., None], -1).mean()

    value, gradients = jax.value_and_grad(loss)(params)
    return value, nnx.to_pure_dict(gradients)


CASES = [
    (3, 2, "gpipe"),
    *(pytest.param(K, 1, "1f1b", marks=pytest.mark.slow) for K in (1, 2)),
]


@pytest.mark.parametrize(("stages", "replicas", "schedule"), CASES)
def test_a_decoder_with_a_tied_table_has_the_gradients_of_the_model(
    stages: int, replicas: int, schedule: str
) -> None:
    with jax.enable_x64(True):
        model = Decoder(rngs=nnx.Rngs(0))
        model.embed.dtype = jnp.float64
        nnx.update(model, jax.tree.map(lambda a: a.astype(float), nnx.state(model, nnx.Param)))
        pipe = build(gpipe.from_module(model, BLOCKS), stages, replicas, schedule=schedule)
        assert pipe.layers[0].ties == (("embedding", "embed.embedding"),)
        assert pipe.layers[1] == pipe.layers[2] and pipe.shapes[1].fixed.constants
        state = pipe.init(seed=0)
        np.testing.assert_allclose(
            pipe.predict(state, TOKENS), model(jnp.asarray(TOKENS)), atol=1e-12
        )
        (value, _), gradients, _ = pipe.value_and_grad(state, BATCH)
        expected, of_model = loss_and_gradients(model)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        embed, *blocks, last = pipe.to_layers(gradients)
        own = {"embed": embed, "blocks": dict(enumerate(blocks)), "norm": last["norm"]}
        assert jax.tree.structure(own) == jax.tree.structure(of_model)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(of_model), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))


def test_the_decoder_is_converted_in_at_most_five_lines() -> None:
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    lines = text.split("# --- the conversion of the decoder ---\n")[1].split("# --- end ---")[0]
    assert len(lines.strip().splitlines()) + 3 <= 5  # and the function, of three lines


def test_values_come_back_bit_for_bit() -> None:
    model = Decoder(rngs=nnx.Rngs(3))
    pipe = build(gpipe.from_module(model, BLOCKS), 2)
    back = pipe.to_module(pipe.init(seed=1))
    assert isinstance(back, Decoder) and back is not model
    pairs = zip(jax.tree.leaves(nnx.state(back)), jax.tree.leaves(nnx.state(model)), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


def test_trained_values_come_back_and_the_model_stays_as_it_was() -> None:
    model = Decoder(rngs=nnx.Rngs(3))
    before = model.embed.embedding[...]
    before_bias = np.asarray(model.blocks[2].up.bias)
    pipe = build(gpipe.from_module(model, BLOCKS), 2)
    params = [jax.tree.map(lambda a: a + 1, tree) for tree in pipe.to_layers(pipe.init())]
    back = pipe.to_module(pipe.from_layers(params))
    np.testing.assert_array_equal(back.embed.embedding[...], before + 1)
    np.testing.assert_array_equal(model.embed.embedding[...], before)
    np.testing.assert_array_equal(back.blocks[2].up.bias[...], before_bias + 1)


def test_a_class_is_built_and_functions_stand_between_blocks() -> None:
    first, *_, last = gpipe.from_module(Decoder, ["embed", lambda x: x[:, -1]], depth=1)
    assert str(first) == "Embed(...)" and last.init(jax.random.key(0), None) == {}


class Shared(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.table = jnp.ones(3)
        self.parts = nnx.List([nnx.Linear(3, 3, rngs=rngs), jnp.tanh])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["norms"], "Shared has no part 'norms'.*norm"),
        (["table"], "`table` of Shared is neither a module nor a list of modules"),
        ([3], "a block is a name, a function, or a tuple of names and a function, as .*, got 3"),
        ("norm", "`blocks` must be a list of names and functions, got 'norm'; name the parts"),
        ([("norm",)], r'a tuple of names and a function, as \("norm", "embed", function\), got'),
        ([("norms", head)], "Shared has no part 'norms'"),
        ([("parts", head)], '`parts` of Shared is a list, but .* as "parts.0"'),
        (["norm.scale"], "neither a module nor a list of modules: a value of type Param; name"),
        ([nnx.Linear(3, 3, rngs=nnx.Rngs(0))], "got Linear.*, a module instance; give .*parts.0"),
        (
            [(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), head)],
            'got a tuple of modules; give a module by its name in Shared, such as "norm", "parts',
        ),
        ([("norm", "norm", head)], "a tuple names a module twice: norm, norm; name it once"),
        (["norm", "norm"], "the statistics 'mean' are in the blocks of two layers"),
    ],
)
def test_wrong_blocks_are_refused(blocks: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        gpipe.from_module(Shared(rngs=nnx.Rngs(0)), blocks)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            lambda model: lambda x: model.embed.attend(model.norm(x)),
            r"layer 1, Parts\(...\), computes with embed.embedding, norm.scale of Decoder, which "
            r'its function does not take.*name the .*\("embed", "norm", function\), and use those',
        ),
        (lambda model: model.norm.__call__, r'computes with norm.scale .*\("norm", function\)'),
        (
            lambda model: ("norm", jax.jit(lambda norm, x: model.embed.attend(norm(x)))),
            r"computes with embed.embedding of Decoder, .*copy an array that is meant as a const",
        ),
    ],
)
def test_a_function_that_closes_over_the_model_is_refused(last: Any, message: str) -> None:
    model = Decoder(depth=0, rngs=nnx.Rngs(0))
    layers = gpipe.from_module(model, ["embed", last(model)])
    with pytest.raises(ArgumentError, match=message):
        infer_shapes(layers, TOKENS)


def test_a_function_may_close_over_constants_and_settings_of_the_model() -> None:
    model, table = Decoder(depth=0, rngs=nnx.Rngs(0)), jnp.ones((WORDS, WIDTH))

    def score(x: jax.Array) -> jax.Array:
        return x @ table.T / model.embed.features

    *_, last = infer_shapes(gpipe.from_module(model, ["embed", score]), TOKENS)
    assert last.output.shape == (*TOKENS.shape, WORDS)


def test_a_function_that_changes_another_module_is_refused() -> None:
    model = Shared(rngs=nnx.Rngs(0))
    layers = gpipe.from_module(model, [lambda x: model.norm(x)])
    message = r'layer 0, Parts.* changes a module that it does not take .*\("dropout", function\)'
    with pytest.raises(ValueError, match=message):
        infer_shapes(layers, np.ones((2, 3), np.float32))


def test_patterns_may_be_names_of_the_model() -> None:
    layers = gpipe.from_module(Decoder(depth=2, rngs=nnx.Rngs(0)), BLOCKS)
    shapes = leaf_names.freeze(infer_shapes(layers, TOKENS), frozen=["embed", "blocks.1"])
    assert [len(jax.tree.leaves(shape.params)) for shape in shapes] == [0, 4, 0, 1]


class Nested(nnx.Module):
    """Have parts whose names are those of attributes of `Parts`, or alike."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.function = nnx.Dict(names=nnx.Linear(3, 3, rngs=rngs))
        self.function_names = nnx.Linear(3, 3, rngs=rngs)
        self.names = nnx.Linear(3, 3, rngs=rngs)


def test_parts_may_have_any_names() -> None:
    model, x = Nested(rngs=nnx.Rngs(0)), jnp.ones((2, 3))
    alike = ("function.names", "function_names", lambda a, b, x: b(a(x)))
    twice, once = gpipe.from_module(model, [alike, ("names", lambda names, x: names(x))])
    y = x
    for described in (twice, once):
        y, _ = described.apply(described.init(KEY, y), {}, y, Context(KEY, train=True))
    expected = model.names(model.function_names(model.function["names"](x)))
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_values_are_those_of_the_call() -> None:
    model = Decoder(depth=1, rngs=nnx.Rngs(0))
    layers = gpipe.from_module(model, ["embed"])
    before = jax.tree.map(np.asarray, nnx.state(model))
    nnx.update(model, jax.tree.map(lambda a: a + 1, before))
    back = to_module(layers, [one.init(KEY, TOKENS) for one in layers], [{}])
    jax.tree.map(np.testing.assert_array_equal, nnx.state(back), before)


def test_a_list_may_have_functions() -> None:
    model = Shared(rngs=nnx.Rngs(0))
    linear, tanh = gpipe.from_module(model, ["parts"])
    x, context = jnp.ones((2, 3)), Context(jax.random.key(0), train=True)
    y, _ = linear.apply(linear.init(context.key, x), {}, x, context)
    y, _ = tanh.apply({}, {}, y, context)
    np.testing.assert_allclose(y, jnp.tanh(model.parts[0](x)), rtol=1e-6)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (3, {}, r"takes an nnx.Module instance, or its class .* got 3 of type int"),
        (
            [nnx.Linear(3, 3, rngs=nnx.Rngs(0))],
            {},
            r"got a list of modules; make a layer of each .*gpipe_jax.layer\(module\)",
        ),
        (Shared(rngs=nnx.Rngs(0)), {"depth": 3}, r"leave out depth, or give the class Shared"),
        (Decoder, {"dept": 3}, r"from_module\(Decoder, ...\) does not fit .* mean 'depth'"),
    ],
)
def test_what_is_no_model_is_refused(model: Any, arguments: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        gpipe.from_module(model, ["norm"], **arguments)


def test_layers_of_another_source_have_no_model() -> None:
    model = Decoder(rngs=nnx.Rngs(0))
    layers = gpipe.from_module(model, ["embed"])
    pipe = build([*layers, layer(nnx.Linear, in_features=WIDTH, out_features=WORDS)], 2)
    with pytest.raises(
        ArgumentError, match=r"layer 1, Linear\(.*is not from the model of the other"
    ):
        pipe.to_module(pipe.init())
