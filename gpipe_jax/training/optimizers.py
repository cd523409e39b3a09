"""Optimizers that act on the rectangular form of the parameters, as if on the layers themselves.

Elementwise optax transformations and global norms give the same result on slots and padded packs as
on the layers' own arrays; anything else would depend on how the network was cut, and is refused.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpipe_jax.config import AdamConfig, OptimizerConfig, RmsPropConfig, SgdConfig
from gpipe_jax.utils.trees import PyTree, has_structure_of


def build(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a config, for a run of `steps` steps.

    Add `l2` times the parameters to the gradients, clip their global norm (of the sum: L2 is part
    of the loss, as in TensorFlow), precondition, scale by the learning rate, and subtract the
    learning rate times `weight_decay` times the parameters. Both decays leave out norms and biases.
    """
    hashable: Any = config
    return _build(hashable, steps)


@functools.lru_cache(maxsize=16)  # one optimizer for equal arguments: `check_elementwise` knows it
def _build(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    rate = learning_rate(config, steps)
    parts = []
    if config.l2:
        parts.append(weight_decay(config.l2))
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(_descent(config, rate))
    if config.weight_decay:
        parts.append(weight_decay(lambda step: -config.weight_decay * rate(step)))
    return optax.chain(*parts)


def _descent(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    scale = optax.scale_by_learning_rate(rate)
    if isinstance(config, SgdConfig):
        return optax.chain(optax.trace(config.momentum, config.nesterov), scale)
    if isinstance(config, AdamConfig):
        return optax.chain(optax.scale_by_adam(config.b1, config.b2, config.eps), scale)
    if isinstance(config, RmsPropConfig):
        # As tf.compat.v1.train.RMSPropOptimizer: the velocity holds steps, not gradients, so that
        # a change of the learning rate reaches it only by and by.
        rms = optax.scale_by_rms(config.decay, config.eps, config.initial, eps_in_sqrt=True)
        return optax.chain(rms, scale, optax.trace(config.momentum))
    raise TypeError(f"no optimizer for {type(config).__name__}")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step: linear warm-up from zero, then the config's schedule."""
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup >= steps:
        raise ValueError(
            f"optimizer.warmup_steps {warmup} leaves nothing of train.steps {steps}; "
            f"use at most {steps - 1}"
        )
    after: optax.Schedule = optax.constant_schedule(peak)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, steps - warmup)
    elif config.schedule == "exponential":
        after = optax.exponential_decay(
            peak, config.decay_steps, config.decay_rate, staircase=config.staircase
        )
    rise = optax.linear_schedule(0.0, peak, max(warmup, 1))
    return optax.join_schedules([rise, after], [warmup])


def decaying(params: PyTree) -> PyTree:
    """Of each parameter whether weight decay acts on it: it leaves out norms and biases."""
    return jax.tree.map(lambda a: decays(a.shape), params)


def decays(shape: tuple[int, ...]) -> bool:
    """Whether weight decay acts on parameters of this shape: on all but vectors and scalars."""
    return len(shape) > 1


def weight_decay(rate: float | optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Add `rate`, which may depend on the step, times the parameters where `decaying` is true.

    The trainer passes `decaying`, of the parameters' structure, to every transformation: for each
    array one bool, or as many as it has elements.
    """
    schedule = rate if callable(rate) else optax.constant_schedule(rate)

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        now = schedule(state.count)
        add = lambda u, p, d: u + jnp.asarray(now, u.dtype) * jnp.asarray(d, u.dtype) * p  # noqa: E731
        state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return jax.tree.map(add, updates, params, extra["decaying"]), state

    return optax.GradientTransformationExtraArgs(init, update)


def moving_average(average: PyTree, params: PyTree, step: jax.Array, decay: float) -> PyTree:
    """The moving average of the parameters after one more update; `step` were done before it.

    With the decay min(decay, (1 + step) / (10 + step)) of tf.train.ExponentialMovingAverage, so
    that early averages forget the initial parameters. Every leaf keeps the average's own type.
    """
    weight = jnp.maximum(1 - decay, 9 / (10 + step))  # of the new parameters: 1 - that decay

    def move(a: jax.Array, p: jax.Array) -> jax.Array:
        return a + weight.astype(a.dtype) * (p.astype(a.dtype) - a)

    return jax.tree.map(move, average, params)


def map_parameters(function: Callable, tree: PyTree, params: PyTree) -> PyTree:
    """Apply `function` to every part of an optimizer's state that has the structure of `params`."""
    alike = has_structure_of(params)
    return jax.tree.map(lambda node: function(node) if alike(node) else node, tree, is_leaf=alike)
