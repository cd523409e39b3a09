"""Transformers: parts against definitions, what sees what, tied tables, and the paper's sizes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpipe_jax import losses, sequential, zoo
from gpipe_jax.layers import random_keys
from gpipe_jax.layers.layer import Context, Layer
from gpipe_jax.layers.shape_inference import count_parameters, infer_shapes
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.zoo.transformer.attention import (
    CausalAttention,
    CrossAttention,
    SelfAttention,
    attend,
)
from gpipe_jax.zoo.transformer.layers import (
    Block,
    DecoderBlock,
    EncoderBlock,
    SinusoidalEmbedding,
    sinusoids,
)

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
TOKENS = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
PAIR = {
    "source": jax.ShapeDtypeStruct((1, 7), jnp.int32),
    "target": jax.ShapeDtypeStruct((1, 5), jnp.int32),
}
SMALL: dict[str, Any] = {"width": 8, "heads": 2, "feed_forward": 12, "vocabulary": 11}


def language_model(**kwargs: Any) -> tuple[list[Layer], dict]:
    """Build a small language model and a batch for it."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 11, (4, 6))
    batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": np.ones(4)}
    return zoo.transformer_lm(length=5, layers=1, **SMALL, **kwargs), batch


def translator(**kwargs: Any) -> tuple[list[Layer], dict]:
    """Build a small encoder-decoder and a batch for it."""
    rng = np.random.default_rng(1)
    source, target = rng.integers(0, 11, (4, 7)), rng.integers(0, 11, (4, 6))
    inputs = {"source": source, "target": target[:, :-1]}
    batch = {"inputs": inputs, "labels": target[:, 1:], "weights": np.ones(4)}
    return zoo.encoder_decoder(layers=1, **SMALL, **kwargs), batch


def run(one: Layer, params: Any, x: Any, *, train: bool = False) -> Any:
    return jax.jit(lambda p, x: one.apply(p, {}, x, Context(KEY, train))[0])(params, x)


# ---- sizes --------------------------------------------------------------------------------------


def transformer_l(layers: int) -> list[Layer]:
    return zoo.transformer_lm(
        vocabulary=32000,
        length=1024,
        width=2048,
        heads=32,
        feed_forward=8192,
        layers=layers,
        positions="sinusoidal",
    )


@pytest.mark.parametrize(
    ("layers", "printed"),
    [(3, "282.2M"), (13, "785.8M"), (103, "5.3B"), (415, "21.0B"), (1663, "83.9B")],
)
def test_counts_of_the_language_models_in_the_gpipe_paper(layers: int, printed: str) -> None:
    """Table 1 of the GPipe paper, by the formula that gives all its digits."""
    count = count_parameters(transformer_l(layers), TOKENS)
    assert count == 50_358_272 * layers + 2 * 32000 * 2048 + 32000
    assert printed == (f"{count / 1e6:.1f}M" if count < 1e9 else f"{count / 1e9:.1f}B")


def test_counts_look_at_equal_layers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    original = CausalAttention.__init__

    def counted(*args: Any, **kwargs: Any) -> None:
        built.append(1)
        original(*args, **kwargs)

    monkeypatch.setattr(CausalAttention, "__init__", counted)
    layers = zoo.transformer_lm(layers=1663, width=6, heads=3)
    count_parameters(layers, jax.ShapeDtypeStruct((1, 128), jnp.int32))
    assert 1 <= len(built) <= 8


def test_halves_are_the_same_network_in_more_layers() -> None:
    options: dict = dict(vocabulary=11, length=5, width=8, heads=2, feed_forward=12, layers=3)
    whole, halves = (zoo.transformer_lm(**options, halves=halves) for halves in (False, True))
    assert len(halves) == len(whole) + 3
    tokens = jnp.asarray(RNG.integers(0, 11, (2, 5)))
    params, scores = scores_of(whole, tokens)
    embedding, *blocks, head = params
    split = [block[half] for block in blocks for half in ("attend", "feed_forward")]
    np.testing.assert_array_equal(
        scores_of(halves, tokens)[1]([embedding, *split, head], tokens), scores(params, tokens)
    )


def translator_count(V: int, D: int, A: int, F: int, L: int, tables: int) -> int:
    """V tokens, width D, A features of all heads, F feed-forward, L encoder and decoder layers."""
    attention = 3 * (D * A + A) + (A * D + D)
    feed_forward = (D * F + F) + (F * D + D)
    norm = 2 * D
    encoder = attention + feed_forward + 2 * norm
    decoder = 2 * attention + feed_forward + 3 * norm
    last_scale = D if tables == 1 else 0  # of the norm before a tied head
    return L * (encoder + decoder) + tables * V * D + V + last_scale


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_width", [None, 3])
def test_counts_of_a_translator(tied: bool, head_width: int | None) -> None:
    layers = zoo.encoder_decoder(layers=3, head_width=head_width, tied=tied, **SMALL)
    inner = 2 * (head_width or 4)
    assert count_parameters(layers, PAIR) == translator_count(11, 8, inner, 12, 3, 1 if tied else 3)


@pytest.mark.parametrize(
    ("layers", "feed_forward", "heads", "printed"),
    [
        (6, 8192, 16, "0.5B"),  # the paper has 400M: that is 0.408B with two tables, not three
        (24, 8192, 16, "1.3B"),
        (12, 16384, 32, "1.3B"),
        (32, 16384, 32, "3.2B"),  # the paper has 3B
        (64, 16384, 32, "6.1B"),  # the paper has 6B
    ],
)
def test_counts_of_the_translators_in_the_gpipe_paper(
    layers: int, feed_forward: int, heads: int, printed: str
) -> None:
    """Section 5 of the GPipe paper: T(L, feed_forward, heads), width 1024, 64k tokens.

    It does not print the width of a head. 1024 / heads would give the last one 5.3B; 64 gives 6.1B,
    and the deep and the wide 1.3B the same number of parameters. With three tables four of the five
    sizes agree as far as they are printed; two tables give the first, but 1.2B for the next two.
    """
    model = zoo.encoder_decoder(
        vocabulary=64000,
        width=1024,
        head_width=64,
        heads=heads,
        feed_forward=feed_forward,
        layers=layers,
    )
    count = count_parameters(model, PAIR)
    assert count == translator_count(64000, 1024, 64 * heads, feed_forward, layers, 3)
    assert f"{count / 1e9:.1f}B" == printed


# ---- parts --------------------------------------------------------------------------------------


def test_sinusoids_are_those_of_the_paper() -> None:
    wanted = np.zeros((6, 8))
    for p in range(6):
        for i in range(4):
            angle = p / 10000 ** (2 * i / 8)
            wanted[p, 2 * i], wanted[p, 2 * i + 1] = math.sin(angle), math.cos(angle)
    np.testing.assert_allclose(sinusoids(6, 8), wanted, atol=1e-6)


def test_sinusoidal_positions_are_added_to_scaled_tokens() -> None:
    one, tokens = layer(SinusoidalEmbedding, vocabulary=5, width=8), jnp.asarray([[3, 0, 3]])
    params = one.init(KEY, tokens)
    assert jax.tree.map(jnp.shape, params) == {"tokens": (5, 8)}
    wanted = params["tokens"][tokens] * 8**0.5 + sinusoids(3, 8)[None]
    np.testing.assert_allclose(run(one, params, tokens), wanted, atol=1e-6)


def attention_of(q: np.ndarray, k: np.ndarray, v: np.ndarray, causal: bool) -> np.ndarray:
    """[B, S, H, K], one query at a time."""
    y = np.zeros(q.shape)
    for b, s, h in np.ndindex(q.shape[:3]):
        seen = s + 1 if causal else k.shape[1]
        weights = np.exp(k[b, :seen, h] @ q[b, s, h] / math.sqrt(q.shape[-1]))
        y[b, s, h] = weights / weights.sum() @ v[b, :seen, h]
    return y


@pytest.mark.parametrize(("length", "causal"), [(4, True), (4, False), (6, False)])
def test_attention_is_its_definition(length: int, causal: bool) -> None:
    q, k, v = (RNG.normal(size=(2, n, 3, 5)) for n in (4, length, length))
    y = attend(*(jnp.asarray(a, jnp.float32) for a in (q, k, v)), causal=causal)
    np.testing.assert_allclose(y, attention_of(q, k, v, causal), atol=1e-5)


def test_cross_attention_asks_with_x_and_answers_from_the_memory() -> None:
    module = CrossAttention(8, 2, head_width=3, rngs=nnx.Rngs(0))
    x, memory = RNG.normal(size=(2, 4, 8)), RNG.normal(size=(2, 5, 8))

    def kernel(linear: nnx.Linear) -> np.ndarray:
        return np.asarray(linear.kernel[...], float)

    q = (x @ kernel(module.q)).reshape(2, 4, 2, 3)
    k, v = ((memory @ a).reshape(2, 5, 2, 3) for a in np.split(kernel(module.kv), 2, axis=1))
    wanted = attention_of(q, k, v, False).reshape(2, 4, 6) @ kernel(module.out)
    y = module(jnp.asarray(x, jnp.float32), jnp.asarray(memory, jnp.float32))
    np.testing.assert_allclose(y, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("block", "seen", "beside"), [(EncoderBlock, "x", "target"), (DecoderBlock, "memory", "x")]
)
def test_a_position_sees_all_of_the_source(block: type[Block], seen: str, beside: str) -> None:
    one = layer(block, width=8, heads=2, feed_forward=6)
    a, b = (jnp.asarray(RNG.normal(size=(1, n, 8)), jnp.float32) for n in (5, 3))
    params = one.init(KEY, {seen: a, beside: b})
    jacobian = jax.jit(jax.jacobian(lambda a: run(one, params, {seen: a, beside: b})["x"]))(a)
    sees = np.abs(jacobian[0, :, :, 0]).sum((1, 3))  # [output position, input position]
    assert sees.shape == (5 if seen == "x" else 3, 5) and (sees > 1e-4).all()


@pytest.mark.parametrize("block", [EncoderBlock, DecoderBlock])
def test_dropout_acts_in_training_only(block: type[Block]) -> None:
    x = jnp.asarray(RNG.normal(size=(2, 3, 8)), jnp.float32)
    tree = {"x": x, "target": x} if block is EncoderBlock else {"x": x, "memory": x}
    still, one = (layer(block, width=8, heads=2, feed_forward=6, dropout=p) for p in (0.0, 0.5))
    params = still.init(KEY, tree)
    wanted = run(still, params, tree)["x"]
    np.testing.assert_allclose(run(one, params, tree)["x"], wanted, rtol=1e-6)
    assert not np.allclose(run(one, params, tree, train=True)["x"], wanted)


def test_self_attention_without_head_width_divides_the_width() -> None:
    one = layer(SelfAttention, width=8, heads=4)
    params = one.init(KEY, jnp.zeros((1, 3, 8)))
    assert params["qkv"]["kernel"].shape == (8, 24) and params["out"]["kernel"].shape == (8, 8)


# ---- whole networks -----------------------------------------------------------------------------


def scores_of(layers: list[Layer], inputs: Any) -> Any:
    """Return the initial parameters, and (params, inputs) -> scores."""
    params, stats = sequential.init(layers, inputs)
    return params, jax.jit(
        lambda p, x: sequential.forward(layers, p, stats, x, KEY, train=False)[0]
    )


def test_scores_depend_on_the_whole_source_and_on_targets_so_far() -> None:
    layers, batch = translator()
    pair = jax.tree.map(lambda a: jnp.asarray(a[:1]), batch["inputs"])
    params, scores = scores_of(layers, pair)
    before = np.asarray(scores(params, pair))

    def change(side: str, i: int) -> np.ndarray:
        """Return each position's change of scores, with another token at position i of a side."""
        other = (pair[side][0, i] + 1) % 11
        after = scores(params, {**pair, side: pair[side].at[0, i].set(other)})
        return np.abs(after - before)[0].max(-1)

    for i in range(7):
        assert (change("source", i) > 1e-5).all(), i
    for i in range(5):
        np.testing.assert_array_equal(change("target", i)[:i], 0)
        assert (change("target", i)[i:] > 1e-5).all(), i


def table_changes(layers: list[Layer], inputs: Any, *tokens: int) -> list[np.ndarray]:
    """Mark the scores [B, T, V] that change with a token's vector in the first layer's table."""
    params, scores = scores_of(layers, inputs)
    embedding = params[0].get("embedding", params[0])
    table, before = embedding["tokens"], np.asarray(scores(params, inputs))
    changes = []
    for token in tokens:
        embedding["tokens"] = table.at[token].add(jnp.arange(8) / 8)
        changes.append(np.abs(scores(params, inputs) - before) > 1e-6)
    return changes


def test_a_tied_language_model_has_one_table() -> None:
    layers, inputs = language_model(tied=True)[0], jnp.asarray([[0, 1, 2, 3, 2]])
    absent, second = table_changes(layers, inputs, 7, 1)
    assert absent[..., 7].all() and absent.sum() == absent[..., 7].sum()
    assert not second[:, 0, 4:].any() and second[:, 1:].mean() > 0.9


def test_an_untied_head_knows_nothing_of_the_embedding() -> None:
    (absent,) = table_changes(language_model()[0], jnp.asarray([[0, 1, 2, 3, 2]]), 7)
    assert not absent.any()


def test_a_tied_translator_has_one_table() -> None:
    inputs = {"source": jnp.asarray([[0, 1, 2, 3]]), "target": jnp.asarray([[4, 5, 6]])}
    layers = translator(tied=True)[0]
    in_neither, in_source, second_in_target = table_changes(layers, inputs, 9, 1, 5)
    assert in_neither[..., 9].all() and in_neither.sum() == in_neither[..., 9].sum()
    assert in_source[..., 7:].mean() > 0.9
    assert second_in_target[:, 1:, 7:].mean() > 0.9 and not second_in_target[:, 0, 7:].any()
    tables = [shape.params for shape in infer_shapes(layers, inputs)]
    assert sum(a.shape == (11, 8) for a in jax.tree.leaves(tables)) == 1


@pytest.mark.parametrize(
    ("layers", "batch"),
    [language_model(tied=True, positions="sinusoidal"), translator(), translator(tied=True)],
    ids=["tied language model", "translator", "tied translator"],
)
def test_every_parameter_learns(layers: list[Layer], batch: dict) -> None:
    batch = jax.tree.map(jnp.asarray, batch)
    params, stats = sequential.init(layers, batch["inputs"])
    step = jax.jit(sequential.value_and_grad(layers, losses.softmax_cross_entropy))
    (loss, _), grads, _ = step(params, stats, batch, random_keys.step_key(0, 0))
    assert 1 < loss < 10
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    for path, grad in jax.tree.leaves_with_path(grads):
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-6, jax.tree_util.keystr(path)


def test_a_bfloat16_translator_computes_in_bfloat16_and_keeps_float32_parameters() -> None:
    for tied in (False, True):
        shapes = infer_shapes(translator(dtype="bfloat16", tied=tied)[0], PAIR)
        outputs = [a.dtype for s in shapes for a in jax.tree.leaves(s.output)]
        assert set(outputs) == {jnp.dtype("bfloat16"), jnp.dtype("int32")}
        assert shapes[-1].output.dtype == jnp.bfloat16
        params = [p.dtype for s in shapes for p in jax.tree.leaves(s.params)]
        assert set(params) == {jnp.dtype("float32")}


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="`positions` is 'rotary': use 'learned' or 'sinusoidal'"):
        zoo.transformer_lm(positions="rotary")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`width` is 9, but sinusoidal .* use an even width"):
        zoo.transformer_lm(width=9, heads=3, positions="sinusoidal")
    with pytest.raises(ValueError, match=r"`width` is 9, but sinusoidal .* use an even width"):
        zoo.encoder_decoder(width=9, heads=3)
    with pytest.raises(ValueError, match="`width` 10 is not a multiple of `heads` 4"):
        zoo.encoder_decoder(width=10, heads=4)
    assert zoo.encoder_decoder(width=10, heads=4, head_width=3)
