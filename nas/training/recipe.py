"""Define how a candidate is trained: SGD with momentum, and a cosine schedule.

This is the recipe of Real et al. for CIFAR-10 (https://arxiv.org/abs/1802.01548, section
"Experiments": SGD with momentum 0.9, L2 5e-4, cosine), without the regularization of their long
trainings.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpipe_jax import losses
from gpipe_jax.training import optimizers
from nas.training.datasets import Augmentation


class Scalars(NamedTuple):
    """Hold the scalars in which trainings by the same program may differ."""

    seed: Any
    learning_rate: Any  # peak
    warmup_steps: Any  # steps of linear warm-up
    steps: Any  # all steps


@dataclass(frozen=True)
class Recipe:
    """Hold the settings that are compiled into the program."""

    batch_size: int
    momentum: float
    weight_decay: float
    label_smoothing: float
    augmentation: Augmentation

    @property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Return the optimizer, whose updates are to be multiplied by `-learning_rate`.

        `update(..., decaying=)` takes the elements that decay.
        """
        decay = optimizers.weight_decay(self.weight_decay)
        return optax.chain(decay, optax.trace(self.momentum))

    def loss(self, scores: jax.Array, labels: jax.Array) -> jax.Array:
        """Return the mean cross entropy of a batch, in nats."""
        return losses.classification(label_smoothing=self.label_smoothing)(scores, labels)[0].mean()


def learning_rate(scalars: Scalars, step: jax.Array) -> jax.Array:
    """Return the learning rate of a step (from 0): a linear rise, then a cosine down to zero."""
    rising = (step + 1) / jnp.maximum(scalars.warmup_steps, 1)
    progress = (step - scalars.warmup_steps) / jnp.maximum(scalars.steps - scalars.warmup_steps, 1)
    falling = (1 + jnp.cos(jnp.pi * progress)) / 2
    return scalars.learning_rate * jnp.where(step < scalars.warmup_steps, rising, falling)
