"""Transformers as lists of layers."""

from typing import Literal

from gpipe_jax.layers.layer import Layer, check_counts, layer
from gpipe_jax.zoo.transformer.layers import (
    AttentionHalf,
    Block,
    Decoded,
    DecoderBlock,
    Embedding,
    EncoderBlock,
    FeedForwardHalf,
    LanguageHead,
    SinusoidalEmbedding,
    SourceEmbedding,
    TargetEmbedding,
    TiedHead,
)

TOKENS = "tokens"  # the name by which embeddings and head share a table


def transformer_lm(
    *,
    vocabulary: int = 256,
    length: int = 128,
    width: int = 128,
    heads: int = 4,
    feed_forward: int = 512,
    layers: int = 4,
    dropout: float = 0.0,
    dtype: str = "float32",
    positions: Literal["learned", "sinusoidal"] = "learned",
    tied: bool = False,
    halves: bool = False,
) -> list[Layer]:
    """A decoder-only language model: tokens int [B, length] to scores [B, length, vocabulary].

    An embedding, pre-norm blocks, and a head. Learned positions are parameters, sinusoidal ones are
    not. The head has its own weights, or the embedding's table if `tied`. With `halves` a block is
    two layers, attention and feed-forward, so that stages can be cut more evenly. `dtype` is what
    the layers compute in; parameters are float32.

    The GPipe paper's Transformer-L (table 1) is `transformer_lm(vocabulary=32000, length=1024,
    width=2048, heads=32, feed_forward=8192, layers=L, positions="sinusoidal")`; its Transformer-24
    and Transformer-48 too.
    """
    check_counts(
        vocabulary=vocabulary, length=length, width=width, heads=heads, feed_forward=feed_forward,
        layers=layers,
    )  # fmt: skip
    _check_heads(width, heads)
    kind = {"width": width, "dtype": dtype}
    if positions == "learned":
        embedding = layer(Embedding, vocabulary=vocabulary, length=length, **kind)
    elif positions == "sinusoidal":
        _check_sinusoids(width)
        embedding = layer(SinusoidalEmbedding, vocabulary=vocabulary, **kind)
    else:
        raise ValueError(f"`positions` is {positions!r}: use 'learned' or 'sinusoidal'")
    block = [layer(Block, heads=heads, feed_forward=feed_forward, dropout=dropout, **kind)]
    if halves:
        block = [
            layer(AttentionHalf, heads=heads, dropout=dropout, **kind),
            layer(FeedForwardHalf, feed_forward=feed_forward, dropout=dropout, **kind),
        ]
    if tied:
        embedding = embedding.tie(TOKENS, "tokens")
    return [embedding, *block * layers, _head(vocabulary, tied, kind)]


def encoder_decoder(
    *,
    vocabulary: int = 256,
    width: int = 128,
    heads: int = 4,
    head_width: int | None = None,
    feed_forward: int = 512,
    layers: int = 2,
    dropout: float = 0.0,
    dtype: str = "float32",
    tied: bool = False,
) -> list[Layer]:
    """A translator: {"source": int [B, S], "target": int [B, T]} to scores [B, T, vocabulary].

    `layers` encoder and as many decoder layers, all pre-norm, each a layer of the list; positions
    are sinusoidal. Scores at t depend on targets up to t and on the whole source, padding too.
    `head_width` is the features of a head, width / heads if None. Source embedding, target
    embedding and head have their own weights; if `tied`, one table (Vaswani et al., 3.4).

    The GPipe paper's T(L, feed_forward, heads) of section 5 is `encoder_decoder(vocabulary=64000,
    width=1024, head_width=64, ...)`. So its 1.3B, 3B and 6B parameters are met; its 400M for
    T(6, 8192, 16) is 408M with one table of the two embeddings, but 474M with three tables as here.
    """
    if head_width is None:
        _check_heads(width, heads)
    _check_sinusoids(width)
    kind = {"width": width, "dtype": dtype}
    block = {"heads": heads, "head_width": head_width, "feed_forward": feed_forward, **kind}
    source, target = (
        layer(part, vocabulary=vocabulary, **kind) for part in (SourceEmbedding, TargetEmbedding)
    )
    if tied:
        source, target = (part.tie(TOKENS, "embedding.tokens") for part in (source, target))
    return [
        source,
        *[layer(EncoderBlock, dropout=dropout, **block)] * layers,
        target,
        *[layer(DecoderBlock, dropout=dropout, **block)] * layers,
        layer(Decoded),
        _head(vocabulary, tied, kind),
    ]


def _head(vocabulary: int, tied: bool, kind: dict) -> Layer:
    if tied:
        return layer(TiedHead, vocabulary=vocabulary, **kind).tie(TOKENS, "tokens")
    return layer(LanguageHead, vocabulary=vocabulary, **kind)


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"`width` {width} is not a multiple of `heads` {heads}")


def _check_sinusoids(width: int) -> None:
    if width % 2:
        raise ValueError(
            f"`width` is {width}, but sinusoidal positions are pairs of a sine and a cosine: "
            f"use an even width"
        )
