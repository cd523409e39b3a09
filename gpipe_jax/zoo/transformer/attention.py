"""Implement multi-head attention (Vaswani et al., Attention Is All You Need, 3.2).

Letters: B examples, S positions, T positions of the other sequence, D width, H heads, K features
of a head.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

Dtype = jnp.dtype | str


def attend(q_BSHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, *, causal: bool) -> jax.Array:
    """Return scaled dot-product attention [B, S, H, K]; if causal, no position sees a later one."""
    # Scores in float32 at least; jax.nn.dot_product_attention would make float64 ones float32.
    dtype = jnp.promote_types(q_BSHK.dtype, jnp.float32)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q_BSHK, k_BTHK, preferred_element_type=dtype)
    scores = scores / math.sqrt(q_BSHK.shape[-1])
    if causal:
        visible = jnp.tril(jnp.ones(scores.shape[2:], bool))[None, None]
        scores = jnp.where(visible, scores, jnp.finfo(dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BTHK.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v_BTHK)


def split_heads(x: jax.Array, count: int, heads: int) -> list[jax.Array]:
    """Split the last axis into `count` arrays, and each of them into heads: [B, S, H, K]."""
    return [a.reshape(*a.shape[:2], heads, -1) for a in jnp.split(x, count, axis=-1)]


class SelfAttention(nnx.Module):
    """Attend from x [B, S, D] to itself, with several heads; K is `head_width`, or else D / H."""

    causal = False

    def __init__(
        self,
        width: int,
        heads: int,
        dtype: Dtype = "float32",
        head_width: int | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        inner = heads * (head_width or width // heads)
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * inner, dtype=jnp.dtype(dtype), rngs=rngs)
        self.out = nnx.Linear(inner, width, dtype=jnp.dtype(dtype), rngs=rngs)

    def __call__(self, x_BSD: jax.Array) -> jax.Array:
        q, k, v = split_heads(self.qkv(x_BSD), 3, self.heads)
        y = attend(q, k, v, causal=self.causal)
        return self.out(y.reshape(*y.shape[:2], -1))


class CausalAttention(SelfAttention):
    """Attend from x [B, S, D] to itself, without a position seeing a later one."""

    causal = True


class CrossAttention(nnx.Module):
    """Attend from x [B, T, D] to all positions of a memory [B, S, D], with several heads."""

    def __init__(
        self,
        width: int,
        heads: int,
        dtype: Dtype = "float32",
        head_width: int | None = None,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        inner = heads * (head_width or width // heads)
        self.heads = heads
        self.q = nnx.Linear(width, inner, dtype=jnp.dtype(dtype), rngs=rngs)
        self.kv = nnx.Linear(width, 2 * inner, dtype=jnp.dtype(dtype), rngs=rngs)
        self.out = nnx.Linear(inner, width, dtype=jnp.dtype(dtype), rngs=rngs)

    def __call__(self, x_BTD: jax.Array, memory_BSD: jax.Array) -> jax.Array:
        (q,) = split_heads(self.q(x_BTD), 1, self.heads)
        k, v = split_heads(self.kv(memory_BSD), 2, self.heads)
        y = attend(q, k, v, causal=False)
        return self.out(y.reshape(*y.shape[:2], -1))
