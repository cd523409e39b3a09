"""Build optimizers that act on packed parameters as on the layers' own.

The pipeline keeps the parameters of all stages in rectangular arrays, stacked and padded.
Elementwise optax transformations and global norms give the same result there as on the layers' own
arrays. Anything else would depend on the partition; `elementwise` refuses it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gpipe_jax import own_code
from gpipe_jax.config.optimizers import (
    AdamConfig,
    LionConfig,
    MuonConfig,
    OptimizerConfig,
    PythonOptimizerConfig,
    RmsPropConfig,
    SgdConfig,
)
from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.training.grouping import by_pattern
from gpipe_jax.training.grouping.by_pattern import grouped as grouped
from gpipe_jax.training.grouping.model_masks import for_layers as for_layers
from gpipe_jax.utils.trees import PyTree, has_structure_of, path_name


def build(
    config: OptimizerConfig,
    steps: int,
    folder: own_code.Folder = None,
    shapes: Sequence[LayerShape] = (),
) -> optax.GradientTransformation:
    """Build the optimizer of a config.

    An update, in this order: add `l2` times the parameters to the gradients; clip their global
    norm (of the sum, because L2 is part of the loss, as in TensorFlow); precondition; scale by the
    learning rate; subtract the learning rate times `weight_decay` times the parameters. Both decays
    leave out norms and biases. The norm is that of all groups together.

    Args:
        config: The `optimizer` section of a `Config`, such as `AdamConfig(learning_rate=3e-4)`.
        steps: Updates of the whole run; the schedule of the learning rate ends there.
        folder: Where to look for the Python file of `PythonOptimizerConfig` before the current
            folder. Default: nowhere.
        shapes: The shapes of the network's layers, `pipe.shapes`; required if the config has
            groups. Default: none.

    Returns:
        An optax transformation that acts on each element alone (and by global norms). Its `update`
        needs the keyword `decaying`, which `Trainer` passes, if the config has a decay.

    Raises:
        ArgumentError: `warmup_steps` is not less than `steps`; a pattern of `groups` matches no
            parameter, or its decay has no effect; or the function of the config cannot be called,
            or returns no optax transformation.

    Example::

        tx = gpipe.optimizers.build(config.optimizer, steps=config.train.steps)
        trainer = gpipe.Trainer(pipe, tx)
    """
    if config.groups:
        return _grouped(config, steps, folder, shapes)
    if isinstance(config, PythonOptimizerConfig):
        return _ungrouped(config, steps, folder)
    hashable: Any = config
    return _build(hashable, steps)


@functools.lru_cache(maxsize=16)  # one object for equal arguments: `check_elementwise` caches by it
def _build(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return _ungrouped(config, steps, None)


def _ungrouped(
    config: OptimizerConfig, steps: int, folder: own_code.Folder
) -> optax.GradientTransformation:
    # Checkpoints name the state by the positions in this chain.
    return optax.chain(*_before(config), *_clip(config), *_after(config, steps, folder))


def _grouped(
    config: OptimizerConfig, steps: int, folder: own_code.Folder, shapes: Sequence[LayerShape]
) -> optax.GradientTransformation:
    """Do as without groups, with the settings of its own group for each parameter."""
    groups = config.groups
    labels = by_pattern.labels(shapes, [group.match for group in groups])
    for n, group in enumerate(groups, 1):
        for setting in ("weight_decay", "l2"):
            if group.settings.get(setting):
                decays = [decaying(shape.params) for shape in shapes]
                by_pattern.check_decay(labels, decays, n, setting)
    own = [config, *(config.model_copy(update=group.settings) for group in groups)]
    before = [optax.chain(optax.identity(), *_before(each)) for each in own]
    after = [optax.chain(*_after(each, steps, folder)) for each in own]
    return optax.chain(
        by_pattern.partition(labels, before),
        *_clip(config),
        by_pattern.partition(labels, after),
    )


Parts = list[optax.GradientTransformation]


def _before(config: OptimizerConfig) -> Parts:
    """Return what comes before the clipping."""
    return [weight_decay(config.l2)] if config.l2 else []


def _clip(config: OptimizerConfig) -> Parts:
    return [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]


def _after(config: OptimizerConfig, steps: int, folder: own_code.Folder) -> Parts:
    """Return what comes after the clipping: the descent and the weight decay."""
    rate = learning_rate(config, steps)
    if isinstance(config, PythonOptimizerConfig):
        descent = _named(config, rate, folder)
    else:
        descent = _descent(config, rate)
    if not config.weight_decay:
        return [descent]
    return [descent, weight_decay(lambda step: -config.weight_decay * rate(step))]


def _named(
    config: PythonOptimizerConfig, rate: optax.Schedule, folder: own_code.Folder
) -> optax.GradientTransformation:
    """Return what the function of a config returns."""
    given = {"learning_rate": rate}
    tx = own_code.call(config.function, config.arguments, folder, given=given)
    if not isinstance(tx, optax.GradientTransformation):
        raise ArgumentError(
            "function",
            f"`function` {config.function} returned a {type(tx).__name__}; it must return an "
            f"optax.GradientTransformation",
        )
    return tx


def _descent(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    scale = optax.scale_by_learning_rate(rate)
    if isinstance(config, SgdConfig):
        return optax.chain(optax.trace(config.momentum, config.nesterov), scale)
    if isinstance(config, AdamConfig):
        return optax.chain(optax.scale_by_adam(config.b1, config.b2, config.eps), scale)
    if isinstance(config, LionConfig):
        return optax.chain(optax.scale_by_lion(config.b1, config.b2), scale)
    if isinstance(config, MuonConfig):
        return optax.contrib.muon(
            rate,
            ns_steps=config.ns_steps,
            beta=config.momentum,
            nesterov=config.nesterov,
            adam_b1=config.b1,
            adam_b2=config.b2,
        )
    if isinstance(config, RmsPropConfig):
        # As tf.compat.v1.train.RMSPropOptimizer: the velocity holds steps, not gradients. So a
        # change of the learning rate takes effect gradually.
        rms = optax.scale_by_rms(config.decay, config.eps, config.initial, eps_in_sqrt=True)
        return optax.chain(rms, scale, optax.trace(config.momentum))
    raise TypeError(f"no optimizer for {type(config).__name__}")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return the learning rate of a config: linear warm-up from zero, then the config's schedule.

    Args:
        config: The `optimizer` section of a `Config`.
        steps: Updates of the whole run.

    Returns:
        A function of the number of updates done before: a scalar.

    Raises:
        ArgumentError: `warmup_steps` is not less than `steps`.

    Example::

        rate = gpipe.optimizers.learning_rate(config.optimizer, steps=1000)
        rate(0), rate(999)
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    if warmup >= steps:
        raise ArgumentError(
            "warmup_steps",
            f"`warmup_steps` {warmup} leaves nothing of the run's {steps} steps (train.steps); "
            f"use at most {steps - 1}",
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
    """Return a mask of the parameters that weight decay applies to: all but norms and biases.

    Args:
        params: A tree of arrays, named as the layers name them; see `decays`.

    Returns:
        A tree of the same structure, of bools.
    """
    return jax.tree.map_with_path(lambda path, a: decays(path_name(path), a.shape), params)


def decays(name: str, shape: tuple[int, ...]) -> bool:
    """Check whether weight decay applies to a parameter: not to one of a norm, nor to a bias.

    These are the vectors and scalars, and the arrays of any shape that are named `bias` or `scale`,
    as Flax does, or end with `_bias` or `_scale`. Attention has biases with an axis of heads.

    Args:
        name: The path of the parameter in its layer, as "query.kernel".
        shape: The shape of the parameter in its layer.

    Returns:
        True if it decays.

    Example:
        >>> decays("query.kernel", (8, 2, 4)), decays("query.bias", (2, 4)), decays("gain", (8,))
        (True, False, False)
    """
    last = name.rpartition(".")[2]
    return len(shape) > 1 and not f"_{last}".endswith(("_bias", "_scale"))


def weight_decay(rate: float | optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Add `rate` times the parameters to the updates, where `decaying` is true.

    Args:
        rate: The factor, or a function of the number of updates done before.

    Returns:
        An optax transformation. Its `update` needs the keyword `decaying`, a tree of the
        parameters' structure: for each array one bool, or an array of bools that broadcasts to it.
        The trainer passes it to every transformation.

    Example::

        tx = optax.chain(optax.scale_by_adam(), weight_decay(1e-4), optax.scale(-1e-3))
    """
    schedule = rate if callable(rate) else optax.constant_schedule(rate)

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: Any, params: PyTree = None, **extra: Any
    ) -> tuple[PyTree, Any]:
        now = schedule(state.count)

        def add(u: jax.Array, p: jax.Array, d: Any) -> jax.Array:
            return u + jnp.asarray(now, u.dtype) * jnp.asarray(d, u.dtype) * p

        state = optax.ScaleByScheduleState(optax.safe_increment(state.count))
        return jax.tree.map(add, updates, params, extra["decaying"]), state

    return optax.GradientTransformationExtraArgs(init, update)


def moving_average(average: PyTree, params: PyTree, step: jax.Array, decay: float) -> PyTree:
    """Return the moving average of the parameters after one more update.

    The decay is min(decay, (1 + step) / (10 + step)), as in tf.train.ExponentialMovingAverage, so
    that early averages forget the initial parameters.

    Args:
        average: The average before; each leaf keeps its type.
        params: The parameters after the update.
        step: Number of updates before this one.
        decay: The decay of late updates, in [0, 1).

    Returns:
        The new average.
    """
    weight = jnp.maximum(1 - decay, 9 / (10 + step))  # of the new parameters: 1 - that decay

    def move(a: jax.Array, p: jax.Array) -> jax.Array:
        return a + weight.astype(a.dtype) * (p.astype(a.dtype) - a)

    return jax.tree.map(move, average, params)


def map_parameters(function: Callable, tree: PyTree, params: PyTree) -> PyTree:
    """Apply `function` to every subtree of a state that has the form of the parameters.

    Args:
        function: A function of such a subtree.
        tree: The state of an optimizer, or a tree of the same structure.
        params: The parameters.

    Returns:
        The tree with these subtrees replaced; everything else stays.
    """
    is_like_params = has_structure_of(params)

    def apply(node: PyTree) -> PyTree:
        return function(node) if is_like_params(node) else node

    return jax.tree.map(apply, tree, is_leaf=is_like_params)
