"""Build Transformers: language models and encoder-decoders."""

from typing import Literal

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.utils.checks import check_counts
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

TOKENS = "tokens"  # name of the table that embeddings and head share


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
    """Build a decoder-only language model: an embedding, pre-norm blocks, and a head.

    Transformer-L of the GPipe paper (table 1), and its Transformer-24 and Transformer-48, are
    `transformer_lm(vocabulary=32000, length=1024, width=2048, heads=32, feed_forward=8192,
    layers=L, positions="sinusoidal")`.

    Args:
        vocabulary: Number of tokens. Default: 256.
        length: Positions of a text. Default: 128.
        width: D, features of a position; a multiple of `heads`. Default: 128.
        heads: Attention heads. Default: 4.
        feed_forward: Inner features of the feed-forward half of a block. Default: 512.
        layers: Number of blocks. Default: 4.
        dropout: Probability to drop a feature after attention and feed-forward. Default: 0.
        dtype: Type to compute in; parameters are float32. Default: "float32".
        positions: "learned" positions are parameters; "sinusoidal" ones are not, and need an even
            width. Default: "learned".
        tied: Whether the head uses the embedding's table. Default: False.
        halves: Whether each block is two layers, attention and feed-forward, so that stages can be
            more even. Default: False.

    Returns:
        Layers from tokens int [B, length] to scores [B, length, vocabulary].

    Raises:
        ValueError: A number is less than 1, or the width does not fit the heads or positions.

    Example:
        >>> len(transformer_lm(layers=6))
        8
    """
    check_counts(
        vocabulary=vocabulary, length=length, width=width, heads=heads, feed_forward=feed_forward,
        layers=layers,
    )  # fmt: skip
    _check_heads(width, heads)
    common = {"width": width, "dtype": dtype}
    if positions == "learned":
        embedding = layer(Embedding, vocabulary=vocabulary, length=length, **common)
    elif positions == "sinusoidal":
        _check_sinusoids(width)
        embedding = layer(SinusoidalEmbedding, vocabulary=vocabulary, **common)
    else:
        raise ArgumentError(
            "positions", f"`positions` is {positions!r}: use 'learned' or 'sinusoidal'"
        )
    block = [layer(Block, heads=heads, feed_forward=feed_forward, dropout=dropout, **common)]
    if halves:
        block = [
            layer(AttentionHalf, heads=heads, dropout=dropout, **common),
            layer(FeedForwardHalf, feed_forward=feed_forward, dropout=dropout, **common),
        ]
    if tied:
        embedding = embedding.tie(TOKENS, "tokens")
    return [embedding, *block * layers, _head(vocabulary, tied, common)]


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
    """Build an encoder-decoder, as for translation. All blocks are pre-norm.

    Scores at position t depend on the targets up to t and on the whole source, including padding.
    Positions are sinusoidal.

    Source: Vaswani et al., https://arxiv.org/abs/1706.03762. T(L, feed_forward, heads) of the GPipe
    paper, section 5, is `encoder_decoder(vocabulary=64000, width=1024, head_width=64, ...)`, which
    has its 1.3B, 3B and 6B parameters. Its 400M for T(6, 8192, 16) is 408M with one table for both
    embeddings, but 474M with three tables as here.

    Args:
        vocabulary: Number of tokens, of source and target. Default: 256.
        width: D, features of a position; even. Default: 128.
        heads: Attention heads. Default: 4.
        head_width: Features of a head. Default: `width` / `heads`, which must be whole.
        feed_forward: Inner features of the feed-forward half of a block. Default: 512.
        layers: Number of encoder blocks, and of decoder blocks. Default: 2.
        dropout: Probability to drop a feature after attention and feed-forward. Default: 0.
        dtype: Type to compute in; parameters are float32. Default: "float32".
        tied: Whether both embeddings and the head share one table (Vaswani et al., section 3.4).
            Default: False.

    Returns:
        Layers from {"source": int [B, S], "target": int [B, T]} to scores [B, T, vocabulary]. Each
        block is one layer.

    Raises:
        ValueError: The width is odd, or not a multiple of `heads`.

    Example:
        >>> len(encoder_decoder(layers=2))
        8
    """
    if head_width is None:
        _check_heads(width, heads)
    _check_sinusoids(width)
    common = {"width": width, "dtype": dtype}
    block = {"heads": heads, "head_width": head_width, "feed_forward": feed_forward, **common}
    source, target = (
        layer(module, vocabulary=vocabulary, **common)
        for module in (SourceEmbedding, TargetEmbedding)
    )
    if tied:
        source, target = (table.tie(TOKENS, "embedding.tokens") for table in (source, target))
    return [
        source,
        *[layer(EncoderBlock, dropout=dropout, **block)] * layers,
        target,
        *[layer(DecoderBlock, dropout=dropout, **block)] * layers,
        layer(Decoded),
        _head(vocabulary, tied, common),
    ]


def _head(vocabulary: int, tied: bool, common: dict) -> Layer:
    if tied:
        return layer(TiedHead, vocabulary=vocabulary, **common).tie(TOKENS, "tokens")
    return layer(LanguageHead, vocabulary=vocabulary, **common)


def _check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ArgumentError("width", f"`width` {width} is not a multiple of `heads` {heads}")


def _check_sinusoids(width: int) -> None:
    if width % 2:
        raise ArgumentError(
            "width",
            f"`width` is {width}, but sinusoidal positions are pairs of a sine and a cosine: "
            f"use an even width",
        )
