"""How a candidate is trained: stochastic gradient descent with momentum and a cosine schedule.

That is the recipe of Real et al. for CIFAR-10 (https://arxiv.org/abs/1802.01548, section
"Experiments": SGD with momentum 0.9, L2 5e-4, cosine), without their regularization of long runs.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpipe_jax import losses
from gpipe_jax.training import optimizers
from nas.training.datasets import Augmentation


class Plan(NamedTuple):
    """What may differ between trainings by the same program: scalars."""

    seed: Any
    learning_rate: Any  # at its highest
    warmup: Any  # steps of linear rise
    steps: Any  # in all


@dataclass(frozen=True)
class Recipe:
    """What is part of the program."""

    batch_size: int
    momentum: float
    weight_decay: float
    label_smoothing: float
    augmentation: Augmentation

    @property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """To be scaled by `- rate`; `update(..., decaying=)` says which entries decay."""
        decay = optimizers.weight_decay(self.weight_decay)
        return optax.chain(decay, optax.trace(self.momentum))

    def loss(self, scores: jax.Array, labels: jax.Array) -> jax.Array:
        """The mean cross entropy of a batch, in nats."""
        return losses.classification(label_smoothing=self.label_smoothing)(scores, labels)[0].mean()


def rate(plan: Plan, step: jax.Array) -> jax.Array:
    """The learning rate of a step, from 0: a linear rise, then a cosine down to zero."""
    rising = (step + 1) / jnp.maximum(plan.warmup, 1)
    done = (step - plan.warmup) / jnp.maximum(plan.steps - plan.warmup, 1)
    falling = (1 + jnp.cos(jnp.pi * done)) / 2
    return plan.learning_rate * jnp.where(step < plan.warmup, rising, falling)
