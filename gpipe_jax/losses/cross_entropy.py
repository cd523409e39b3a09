"""Define the losses of classifiers and of language models: cross entropies of integer labels."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpipe_jax.errors import ArgumentError
from gpipe_jax.losses.elements import Counted
from gpipe_jax.utils.checks import check_fraction
from gpipe_jax.utils.trees import PyTree


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
    """Compute the cross entropy of integer labels, and the accuracy.

    Args:
        logits: Scores [B, ..., C], in any floating-point type.
        labels: Integers [B, ...] in 0..C-1. Another label has the loss NaN, which does not count
            for an example of weight 0.

    Returns:
        The losses [B, ...] in nats, in float32 at least; and {"accuracy": [B, ...]}, 0 or 1 each.

    Example:
        >>> losses, metrics = softmax_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]))
        >>> float(losses[0])  # log(4)
        1.3862943649291992
    """
    losses = _cross_entropy(logits, labels)
    return losses, {"accuracy": (logits.argmax(-1) == labels).astype(losses.dtype)}


def _cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, z_loss: float = 0.0
) -> jax.Array:
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="fill")[..., 0]
    chosen = jnp.where(labels < 0, jnp.nan, chosen)  # an index below zero would count from the end
    expected = (1 - smoothing) * chosen + smoothing * logits.mean(-1) if smoothing else chosen
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    losses = normalizer - expected
    return losses + z_loss * jnp.square(normalizer) if z_loss else losses


def token_cross_entropy(
    *, label_smoothing: float = 0.0, z_loss: float = 0.0, ignore_index: int = -100
) -> Callable:
    """Return the loss of a language model: the mean cross entropy of the tokens of the whole batch.

    Every token has the same share, also where examples differ in the number of their tokens.
    Sources: Szegedy et al., https://arxiv.org/abs/1512.00567, section 7 (label smoothing);
    Chowdhery et al., PaLM, https://arxiv.org/abs/2204.02311, section 5 (z-loss).

    Args:
        label_smoothing: e in [0, 1). The target is e / C for each class, and 1 - e more for the
            label. Default: 0.
        z_loss: Factor of log(Z)^2, which is added to the loss; Z is the sum of exp(logits). PaLM
            uses 1e-4. Default: 0.
        ignore_index: The label of tokens that do not count. Default: -100.

    Returns:
        A function (logits [B, ..., C], labels [B, ...]) -> (losses [B], {"accuracy": [B]}). Labels
        may also be {"labels": integers, "weights": weights of the same shape}; see
        `losses.counted`. Equal arguments give equal functions.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> loss = token_cross_entropy()
        >>> labels = jnp.array([[1, 2, -100], [3, -100, -100]])
        >>> loss.count(labels).tolist()
        [2.0, 1.0]
    """
    check_fraction("label_smoothing", label_smoothing)
    if not z_loss >= 0:
        raise ArgumentError("z_loss", f"`z_loss` is {z_loss}; use 0 (no such term) or more")
    return Counted(_CrossEntropy(label_smoothing, z_loss), ignore_index)


@dataclass(frozen=True)
class _CrossEntropy:
    label_smoothing: float
    z_loss: float

    def __call__(self, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict]:
        losses = _cross_entropy(logits, labels, self.label_smoothing, self.z_loss)
        return losses, {"accuracy": (logits.argmax(-1) == labels).astype(losses.dtype)}


def classification(*, label_smoothing: float = 0.0, auxiliary_weight: float = 0.0) -> Callable:
    """Return the loss of an image classifier.

    Source: Szegedy et al., Rethinking the Inception Architecture, https://arxiv.org/abs/1512.00567,
    section 7 (label smoothing).

    Args:
        label_smoothing: e in [0, 1). The target is e / C for each class, and 1 - e more for the
            label. Default: 0.
        auxiliary_weight: The weight of an auxiliary head's loss, which is smoothed too. If it is
            not 0, the network returns a pair (logits, auxiliary logits). Default: 0.

    Returns:
        A function (outputs, labels) -> (losses [B, ...], metrics). The metrics are "accuracy", and
        "top5_accuracy" if there are at least 100 classes, of the first logits only. Equal arguments
        give equal functions.

    Raises:
        ValueError: An argument is out of range; or, in a call, the number of outputs is wrong.

    Example:
        >>> classification(label_smoothing=0.1) == classification(label_smoothing=0.1)
        True
    """
    check_fraction("label_smoothing", label_smoothing)
    if not auxiliary_weight >= 0:
        raise ArgumentError(
            "auxiliary_weight",
            f"`auxiliary_weight` is {auxiliary_weight}; use 0 (no such head) or more",
        )
    return _Classification(label_smoothing, auxiliary_weight)


@dataclass(frozen=True)
class _Classification:
    label_smoothing: float
    auxiliary_weight: float

    def __call__(self, outputs: PyTree, labels: jax.Array) -> tuple[jax.Array, dict]:
        logits, *auxiliary = self._heads(outputs)
        losses = _cross_entropy(logits, labels, self.label_smoothing)
        metrics = {"accuracy": logits.argmax(-1) == labels}
        if logits.shape[-1] >= 100:
            best = jax.lax.top_k(logits, 5)[1]
            metrics["top5_accuracy"] = (best == labels[..., None]).any(-1)
        metrics = {name: hits.astype(losses.dtype) for name, hits in metrics.items()}
        for head in auxiliary:
            extra = _cross_entropy(head, labels, self.label_smoothing)
            losses = losses + self.auxiliary_weight * extra
        return losses, metrics

    def _heads(self, outputs: PyTree) -> tuple[jax.Array, ...]:
        """Return (logits,) or (logits, auxiliary logits)."""
        heads = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
        count = 2 if self.auxiliary_weight else 1
        if len(heads) != count:
            expected = "a pair (logits, auxiliary logits)" if count == 2 else "logits alone"
            got = "1 output" if len(heads) == 1 else f"{len(heads)} outputs"
            raise ValueError(
                f"with `auxiliary_weight` {self.auxiliary_weight} the network must return "
                f"{expected}, got {got}; use both an auxiliary head and its weight, or neither"
            )
        return heads
