"""Define what the steps of a `Pipeline` return."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax

from gpipe_jax.pipeline.state import State
from gpipe_jax.utils.trees import PyTree


class LossAndMetrics(NamedTuple):
    """Hold weighted means over the examples of a batch, equal on every host."""

    loss: jax.Array | float
    metrics: Mapping[str, jax.Array | float]  # what the loss function returns beside the loss


class Weighted(NamedTuple):
    """Hold the losses of some examples, and what these examples count together."""

    weight: float
    value: LossAndMetrics


def weighted_mean(parts: Iterable[Weighted]) -> Weighted:
    """Return the means over all parts, as numbers of Python, and the sum of the weights."""
    total, loss, metrics = 0.0, 0.0, {}
    for weight, value in parts:
        total += weight
        loss += weight * float(value.loss)
        for name, metric in value.metrics.items():
            metrics[name] = metrics.get(name, 0.0) + weight * float(metric)
    scale = total or 1.0
    means = {name: metric / scale for name, metric in metrics.items()}
    return Weighted(total, LossAndMetrics(loss / scale, means))


class StepGradients(NamedTuple):
    """Hold the result of the traced `Pipeline.gradients`."""

    value: LossAndMetrics
    gradients: PyTree  # in the form of `State.params`, at least float32
    stats: PyTree  # running statistics after the step


class ValueAndGrad(NamedTuple):
    """Hold the result of `Pipeline.value_and_grad`."""

    value: LossAndMetrics
    gradients: PyTree  # in the form of `State.params`, at least float32
    state: State  # with the running statistics after the step


class GradientArguments(NamedTuple):
    """Hold the shapes and shardings of the arguments of `Pipeline.gradients`."""

    state: State
    micro_batched: dict
    step: jax.ShapeDtypeStruct
