"""The parts of a decoder-only Transformer: embedding, pre-norm block, head.

Letters: B examples, S positions, D width, H heads, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

Dtype = jnp.dtype | str


class Embedding(nnx.Module):
    """Tokens int [B, S] to vectors [B, S, D]: a learned token vector plus a learned position."""

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


class CausalAttention(nnx.Module):
    """Multi-head self-attention in which no position sees a later one."""

    def __init__(self, width: int, heads: int, dtype: Dtype = "float32", *, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, dtype=jnp.dtype(dtype), rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=jnp.dtype(dtype), rngs=rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        B, S, D = x_BSD.shape
        split = lambda a: a.reshape(B, S, self.heads, D // self.heads)  # noqa: E731
        q, k, v = map(split, jnp.split(self.qkv(x_BSD), 3, axis=-1))
        # Scores in float32 at least; jax.nn.dot_product_attention would make float64 ones float32.
        kind = jnp.promote_types(q.dtype, jnp.float32)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=kind)
        seen = jnp.tril(jnp.ones((S, S), bool))[None, None]
        scores = jnp.where(seen, scores / math.sqrt(D // self.heads), jnp.finfo(kind).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return self.out(y.reshape(B, S, D))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) (Transformer, pre-norm)."""

    def __init__(
        self,
        width: int,
        heads: int,
        feed_forward: int,
        dropout: float = 0.0,
        dtype: Dtype = "float32",
        *,
        rngs: nnx.Rngs,
    ) -> None:
        kind = jnp.dtype(dtype)
        self.norm1 = nnx.LayerNorm(width, dtype=kind, rngs=rngs)
        self.attention = CausalAttention(width, heads, dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, dtype=kind, rngs=rngs)
        self.up = nnx.Linear(width, feed_forward, dtype=kind, rngs=rngs)
        self.down = nnx.Linear(feed_forward, width, dtype=kind, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x_BSD: jax.Array, *, rngs: nnx.Rngs) -> jax.Array:
        x_BSD = x_BSD + self.dropout(self.attention(self.norm1(x_BSD)), rngs=rngs)
        y_BSD = self.down(jax.nn.gelu(self.up(self.norm2(x_BSD))))
        return x_BSD + self.dropout(y_BSD, rngs=rngs)


class LanguageHead(nnx.Module):
    """Vectors [B, S, D] to token scores [B, S, V], after a last layer norm."""

    def __init__(self, width: int, vocabulary: int, dtype: Dtype = "float32", *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, dtype=jnp.dtype(dtype), rngs=rngs)
        self.linear = nnx.Linear(width, vocabulary, dtype=jnp.dtype(dtype), rngs=rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        return self.linear(self.norm(x_BSD))
