"""Divide a Linen model with its values into layers, and get trained values back."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpipe_jax as gpipe
from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.shape_inference import infer_shapes

WIDTH, WORDS, LENGTH = 6, 8, 4
TOKENS = np.random.default_rng(0).integers(0, WORDS, (8, LENGTH)).astype(np.int32)
BATCH = {"inputs": TOKENS, "labels": np.roll(TOKENS, -1, 1)}


class Block(nn.Module):
    """Add a dense layer, with dropout in training; its parts are compact."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        y = nn.tanh(nn.Dense(WIDTH, param_dtype=float)(x))
        return x + nn.Dropout(self.rate)(y, deterministic=not train)


class Encoder(nn.Module):
    def setup(self) -> None:
        self.blocks = [Block() for _ in range(2)]
        self.norm = nn.LayerNorm(param_dtype=float)

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """Predict the next token; the table of tokens is used twice."""

    def setup(self) -> None:
        self.embed = nn.Embed(WORDS, WIDTH, param_dtype=float)
        self.encoder = Encoder()
        self.last = Block()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.embed.attend(self.last(self.encoder(self.embed(tokens))))


def head(last: nn.Module, embed: nn.Embed, x: jax.Array) -> jax.Array:
    return embed.attend(last(x))


BLOCKS = ["embed", "encoder.blocks", "encoder.norm", ("last", "embed", head)]


def bound(model: nn.Module, inputs: Any = TOKENS) -> nn.Module:
    return model.bind(model.init(jax.random.key(0), inputs))


def build(layers: list, stages: int, replicas: int = 1) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        layers,
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=stages, data=replicas),
        example=BATCH,
        micro_batches=2,
    )


def loss(variables: dict) -> jax.Array:
    scores = jax.nn.log_softmax(Decoder().apply(variables, TOKENS))
    return -jnp.take_along_axis(scores, jnp.asarray(BATCH["labels"])[..., None], -1).mean()


@pytest.mark.parametrize(
    ("stages", "replicas"), [(2, 2), pytest.param(4, 1, marks=pytest.mark.slow)]
)
def test_a_model_has_the_loss_and_the_gradients_of_its_apply(stages: int, replicas: int) -> None:
    with jax.enable_x64(True):
        model = bound(Decoder())
        pipe = build(gpipe.from_module(model, BLOCKS), stages, replicas)
        assert pipe.layers[0].ties == (("embedding", "embed.embedding"),)
        assert pipe.layers[1] == pipe.layers[2]  # which share one compiled body
        state = pipe.init(seed=5)
        jax.tree.map(
            np.testing.assert_array_equal, pipe.to_module(state).variables, model.variables
        )
        expected, of_model = jax.value_and_grad(loss)(model.variables)
        (value, _), gradients, _ = pipe.value_and_grad(state, BATCH)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        own = pipe.to_module(pipe.from_layers(pipe.to_layers(gradients))).variables
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), own, of_model
        )


def test_parameters_have_the_names_of_the_model() -> None:
    *_, last = gpipe.from_module(bound(Decoder()), BLOCKS)
    assert last.name_in_model("parts_0.Dense_0.bias") == "last.Dense_0.bias"
    assert gpipe.layer(nn.Dense(3)).name_in_model("bias") is None


def test_a_bound_module_is_a_layer_with_its_values() -> None:
    module = bound(nn.Dense(3), np.ones((2, 4), np.float32))
    one, other = gpipe.layer(module), gpipe.layer(nn.Dense(3))
    own = one.init(jax.random.key(9), jnp.ones((2, 4)))
    jax.tree.map(np.testing.assert_array_equal, own, module.variables["params"])
    assert one.has_values and not other.has_values and one != other


def test_values_for_another_input_are_refused() -> None:
    one = gpipe.layer(bound(nn.Dense(3), np.ones((2, 4), np.float32)))
    message = r"layer 0, Dense.* its values are {.*\[4,3\]}}, but must be {.*\[5,3\]}}"
    with pytest.raises(ValueError, match=message):
        infer_shapes([one], np.ones((2, 5), np.float32))


class Sharing(nn.Module):
    """Give one of its modules to another."""

    def setup(self) -> None:
        self.dense = nn.Dense(4)
        self.twice = Twice(self.dense)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.twice(self.dense(x))


class Twice(nn.Module):
    inner: nn.Module

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inner(self.inner(x))


def test_a_part_that_holds_another_is_refused() -> None:
    x = np.ones((2, 4), np.float32)
    layers = gpipe.from_module(bound(Sharing(), x), ["dense", "twice"])
    message = r"layer 1, Twice\(...\) has other parameters than its values: it shares a module"
    with pytest.raises(ValueError, match=message):
        infer_shapes(layers, x)


@pytest.mark.parametrize("of", [jnp.asarray, np.asarray])
def test_a_function_that_closes_over_the_model_is_refused(of: Any) -> None:
    model = Decoder().bind(jax.tree.map(of, bound(Decoder()).variables))
    layers = gpipe.from_module(model, ["embed", lambda x: model.embed.attend(x)])
    message = r'layer 1, .*computes with embed.embedding of Decoder.*\("embed", function\)'
    with pytest.raises(ArgumentError, match=message):
        infer_shapes(layers, TOKENS)


class Normed(nn.Module):
    """Apply a batch norm, whose statistics are not trained, beside a dense layer."""

    frozen: bool

    def setup(self) -> None:
        self.dense = nn.Dense(4)
        self.norm = nn.BatchNorm(use_running_average=self.frozen)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.dense(x))


def test_statistics_that_change_are_refused() -> None:
    x = np.ones((2, 4), np.float32)
    for blocks in (["dense", "norm"], ["dense", ("norm", lambda norm, x: norm(x))]):
        layers = gpipe.from_module(bound(Normed(frozen=False), x), blocks)
        with pytest.raises(ValueError, match=r"layer 1, .*'batch_stats' in a call.*nnx.BatchNorm"):
            infer_shapes(layers, x)


def test_frozen_statistics_are_constants() -> None:
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    module = Normed(frozen=True)
    params: Any = module.init(jax.random.key(0), x)["params"]
    statistics = {"norm": {"mean": jnp.full(4, 0.5), "var": jnp.full(4, 4.0)}}
    model = module.bind({"params": params, "batch_stats": statistics})
    layers = gpipe.from_module(model, ["dense", ("norm", lambda norm, x: norm(x))])
    batch = {"inputs": x, "labels": x}
    pipe = gpipe.Pipeline(
        layers,
        loss=gpipe.losses.squared_error,
        mesh=gpipe.make_mesh(stages=2),
        example=batch,
        micro_batches=2,
    )
    assert [bool(shape.fixed.constants) for shape in pipe.shapes] == [False, True]

    def plain(params: Any) -> jax.Array:
        variables = {"params": params, "batch_stats": statistics}
        return jnp.square(module.apply(variables, x) - x).mean()

    (value, _), gradients, after = pipe.value_and_grad(pipe.init(), batch)
    expected, of_model = jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    dense, norm = pipe.to_layers(gradients)
    own = {"dense": dense, "norm": norm["parts_0"]}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), own, of_model)
    kept = pipe.to_module(after).variables["batch_stats"]
    jax.tree.map(np.testing.assert_array_equal, kept, statistics)


def test_layers_with_other_constants_differ() -> None:
    x = np.ones((2, 4), np.float32)
    norm = nn.BatchNorm(use_running_average=True)
    first: Any = norm.init(jax.random.key(0), x)
    other = {**first, "batch_stats": {"mean": jnp.ones(4), "var": jnp.ones(4)}}
    same, differs = (gpipe.layer(norm.bind(variables)) for variables in (first, other))
    assert same == gpipe.layer(norm.bind(first)) and same != differs


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["embd"], "Decoder has no part 'embd'; did you mean 'embed'"),
        (["encoder.block"], "Decoder has no part 'encoder.block'"),
        (["last.Dense_0"], "Decoder has no part 'last.Dense_0'"),
    ],
)
def test_wrong_blocks_are_refused(blocks: list, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        gpipe.from_module(bound(Decoder()), blocks)


def test_a_compact_model_has_no_parts() -> None:
    with pytest.raises(ArgumentError, match=r"Block has no part 'Dense_0'; only .* `setup` makes"):
        gpipe.from_module(bound(Block(), np.ones((2, WIDTH))), ["Dense_0"])


@pytest.mark.parametrize("model", [Decoder, Decoder()])
def test_a_model_without_values_is_refused(model: Any) -> None:
    message = r"from_module\(\) takes .*; write from_module\(Decoder\(...\).bind\(variables\)"
    with pytest.raises(TypeError, match=message):
        gpipe.from_module(model, BLOCKS)
