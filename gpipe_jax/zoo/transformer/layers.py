"""Implement the layers of Transformers: embeddings, pre-norm blocks, heads.

The layers of an encoder-decoder pass on a dict: "x", and what later layers need beside it.

Letters: B examples, S positions, T target positions, D width, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from gpipe_jax.zoo.transformer.attention import (
    CausalAttention,
    CrossAttention,
    Dtype,
    SelfAttention,
)


class Embedding(nnx.Module):
    """Map tokens int [B, S] to vectors [B, S, D]: learned token vectors plus learned positions."""

    def __init__(
        self, vocabulary: int, length: int, width: int, dtype: Dtype = "float32", *, rngs: nnx.Rngs
    ) -> None:
        normal = nnx.initializers.normal(0.02)
        self.tokens = nnx.Param(normal(rngs.params(), (vocabulary, width)))
        self.positions = nnx.Param(normal(rngs.params(), (length, width)))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        positions = self.positions[...][: tokens_BS.shape[1]]
        return (self.tokens[...][tokens_BS] + positions[None]).astype(self.dtype)


class SinusoidalEmbedding(nnx.Module):
    """Map tokens int [B, S] to vectors [B, S, D]: sqrt(D) times learned vectors plus `sinusoids`.

    Vaswani et al., Attention Is All You Need, 3.4 and 3.5. S has no limit.
    """

    def __init__(
        self, vocabulary: int, width: int, dtype: Dtype = "float32", *, rngs: nnx.Rngs
    ) -> None:
        unit = nnx.initializers.normal(1 / math.sqrt(width))  # variance 1 after the scaling
        self.tokens = nnx.Param(unit(rngs.params(), (vocabulary, width)))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, tokens_BS: jax.Array) -> jax.Array:
        tokens = self.tokens[...]
        x_BSD = tokens[tokens_BS] * math.sqrt(tokens.shape[1])
        positions = sinusoids(tokens_BS.shape[1], tokens.shape[1])
        return (x_BSD + positions[None].astype(tokens.dtype)).astype(self.dtype)


def sinusoids(length: int, width: int) -> jax.Array:
    """Return positions as vectors [S, D]: sin(p / 10000^(2i/D)) at 2i, the cosine at 2i + 1.

    Vaswani et al., 3.5.
    """
    position_S = jnp.arange(length, dtype=float)
    angle = position_S[:, None] * 10000.0 ** (-jnp.arange(0, width, 2, dtype=float) / width)[None]
    return jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(length, width)


class AttentionHalf(nnx.Module):
    """Compute x + attention(norm(x)), the first half of a block."""

    attention_type: type[SelfAttention] = CausalAttention

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float = 0.0,
        dtype: Dtype = "float32",
        head_width: int | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm = nnx.LayerNorm(width, dtype=jnp.dtype(dtype), rngs=rngs)
        self.attention = self.attention_type(width, heads, dtype, head_width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x_BSD: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        return x_BSD + self.dropout(self.attention(self.norm(x_BSD)), rngs=rngs)


class EncoderAttentionHalf(AttentionHalf):
    """Compute x + attention(norm(x)), in which all positions see each other."""

    attention_type = SelfAttention


class FeedForwardHalf(nnx.Module):
    """Compute x + down(gelu(up(norm(x)))), the second half of a block."""

    def __init__(
        self,
        width: int,
        feed_forward: int,
        dropout: float = 0.0,
        dtype: Dtype = "float32",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        kind = jnp.dtype(dtype)
        self.norm = nnx.LayerNorm(width, dtype=kind, rngs=rngs)
        self.up = nnx.Linear(width, feed_forward, dtype=kind, rngs=rngs)
        self.down = nnx.Linear(feed_forward, width, dtype=kind, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x_BSD: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        y_BSD = self.down(jax.nn.gelu(self.up(self.norm(x_BSD))))
        return x_BSD + self.dropout(y_BSD, rngs=rngs)


class Block(nnx.Module):
    """Compute x + attention(norm(x)), then x + feed_forward(norm(x)): a pre-norm block."""

    attention_half: type[AttentionHalf] = AttentionHalf

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float = 0.0,
        dtype: Dtype = "float32",
        head_width: int | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.attend = self.attention_half(width, heads, dropout, dtype, head_width, rngs=rngs)
        self.feed_forward = FeedForwardHalf(width, feed_forward, dropout, dtype, rngs=rngs)

    def __call__(self, x_BSD: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        return self.feed_forward(self.attend(x_BSD, rngs=rngs), rngs=rngs)


class LanguageHead(nnx.Module):
    """Map vectors [B, S, D] to token scores [B, S, V], after a last layer norm.

    Its table has the shape [V, D] of an embedding, so the first and the last stage of a pipeline
    share a slot for them.
    """

    def __init__(self, width: int, vocabulary: int, dtype: Dtype = "float32", *, rngs: nnx.Rngs):
        self.norm = plain_norm(width, dtype, rngs)
        unit = nnx.initializers.lecun_normal(in_axis=1, out_axis=0)
        self.tokens = nnx.Param(unit(rngs.params(), (vocabulary, width)))
        self.bias = nnx.Param(jnp.zeros(vocabulary))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return scores(self.norm(x_BSD), self.tokens[...], self.bias[...], self.dtype)


def scores(x_BSD: jax.Array, tokens_VD: jax.Array, bias_V: jax.Array, dtype: Dtype) -> jax.Array:
    """Return token scores [B, S, V]: products with the vectors of the tokens, plus a bias."""
    return x_BSD @ tokens_VD.astype(dtype).T + bias_V.astype(dtype)[None, None]


def plain_norm(width: int, dtype: Dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Return a layer norm without parameters.

    Use it if only linear maps with a bias read its output: these can express any scale and bias.
    """
    kind = jnp.dtype(dtype)
    return nnx.LayerNorm(width, use_bias=False, use_scale=False, dtype=kind, rngs=rngs)


class TiedHead(nnx.Module):
    """Map vectors [B, S, D] to token scores [B, S, V] by the `tokens` [V, D] of an embedding.

    Tie them by `layer(TiedHead, ...).tie(name, "tokens")`. The norm has a scale, because a table
    that is shared cannot express one.
    """

    def __init__(self, width: int, vocabulary: int, dtype: Dtype = "float32", *, rngs: nnx.Rngs):
        kind = jnp.dtype(dtype)
        self.norm = nnx.LayerNorm(width, use_bias=False, dtype=kind, rngs=rngs)
        self.tokens = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (vocabulary, width)))
        self.bias = nnx.Param(jnp.zeros(vocabulary))
        self.dtype = kind

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return scores(self.norm(x_BSD), self.tokens[...], self.bias[...], self.dtype)


# --- encoder-decoder ------------------------------------------------------------------------------


class SourceEmbedding(nnx.Module):
    """Map {"source": int [B, S], "target": int [B, T]} to {"x": [B, S, D], "target"}."""

    def __init__(
        self, vocabulary: int, width: int, dtype: Dtype = "float32", *, rngs: nnx.Rngs
    ) -> None:
        self.embedding = SinusoidalEmbedding(vocabulary, width, dtype, rngs=rngs)

    def __call__(self, tree: dict) -> dict:
        return {"x": self.embedding(tree["source"]), "target": tree["target"]}


class EncoderBlock(Block):
    """Apply a block to "x" [B, S, D] of {"x", "target"}; all positions see each other."""

    attention_half = EncoderAttentionHalf

    def __call__(self, tree: dict, *, rngs: nnx.Rngs) -> dict:
        return {**tree, "x": super().__call__(tree["x"], rngs=rngs)}


class TargetEmbedding(nnx.Module):
    """Map {"x" [B, S, D], "target" int [B, T]} to {"x" [B, T, D], "memory": norm(x) [B, S, D]}."""

    def __init__(
        self, vocabulary: int, width: int, dtype: Dtype = "float32", *, rngs: nnx.Rngs
    ) -> None:
        self.embedding = SinusoidalEmbedding(vocabulary, width, dtype, rngs=rngs)
        self.norm = plain_norm(width, dtype, rngs)

    def __call__(self, tree: dict) -> dict:
        return {"x": self.embedding(tree["target"]), "memory": self.norm(tree["x"])}


class DecoderBlock(Block):
    """Apply a causal block, which also attends to the memory, to "x" [B, T, D] of {"x", "memory"}.

    x + self_attention(norm(x)), x + cross_attention(norm(x), memory), x + feed_forward(norm(x)).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float = 0.0,
        dtype: Dtype = "float32",
        head_width: int | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(width, heads, feed_forward, dropout, dtype, head_width, rngs=rngs)
        self.cross_norm = nnx.LayerNorm(width, dtype=jnp.dtype(dtype), rngs=rngs)
        self.cross_attention = CrossAttention(width, heads, dtype, head_width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, tree: dict, *, rngs: nnx.Rngs) -> dict:
        x_BTD = self.attend(tree["x"], rngs=rngs)
        y_BTD = self.cross_attention(self.cross_norm(x_BTD), tree["memory"])
        x_BTD = x_BTD + self.dropout(y_BTD, rngs=rngs)
        return {**tree, "x": self.feed_forward(x_BTD, rngs=rngs)}


class Decoded(nnx.Module):
    """Map {"x", "memory"} to x, for a head."""

    def __call__(self, tree: dict) -> jax.Array:
        return tree["x"]
