"""Define what the steps of a `Pipeline` return."""

from collections.abc import Iterable
from typing import NamedTuple

import jax

from gpipe_jax.pipeline.state import State
from gpipe_jax.utils.trees import PyTree


class LossAndMetrics(NamedTuple):
    """Hold weighted means over the examples of a batch, equal on every host."""

    loss: jax.Array
    metrics: dict[str, jax.Array]  # what the loss function returns beside the loss


class Weighted(NamedTuple):
    """Hold the losses of some examples, and what these examples count together."""

    weight: float
    value: LossAndMetrics


def weighted_mean(parts: Iterable[Weighted]) -> tuple[float, dict[str, float]]:
    """Return the sum of the weights, and the means over all parts: "loss" and the metrics."""
    total, sums = 0.0, dict[str, float]()
    for weight, value in parts:
        total += weight
        for name, mean in {"loss": value.loss, **value.metrics}.items():
            sums[name] = sums.get(name, 0.0) + weight * float(mean)
    return total, {name: a / (total or 1.0) for name, a in sums.items()}


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


class ExtrasValueAndGrad(NamedTuple):
    """Hold the result of `Pipeline.value_and_grad_with_extras`."""

    value: LossAndMetrics
    gradients: PyTree  # in the form of `State.params`, at least float32
    state: State  # with the running statistics after the step
    extras: dict[str, PyTree]  # gradients of extras, in the form of the batch's


class GradientArguments(NamedTuple):
    """Hold the shapes and shardings of the arguments of `Pipeline.gradients`."""

    state: State
    micro_batched: dict
    step: jax.ShapeDtypeStruct
