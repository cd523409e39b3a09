"""Run both builders on the same values, for the tests of the interpreter."""

import functools
from random import Random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_trees_close

from gpipe_jax.genotypes.genotype import Genotype
from nas.spaces.nasnet import NASNetSpace
from nas.training.interpreter.network import Interpreter
from nas.training.interpreter.translation import from_static, to_static
from nas.training.network import Network, PyTree, Shape, Variables
from nas.training.static import Static


class Step(NamedTuple):
    """Hold what a training step computes, and the scores of an evaluation after it."""

    loss: jax.Array
    scores: jax.Array
    gradients: PyTree
    statistics: PyTree
    evaluation: jax.Array


def step(network: Network, architecture: Any, values: Variables, images: jax.Array) -> Step:
    labels = jnp.arange(images.shape[0]) % network.shape.classes

    def loss(parameters: PyTree) -> tuple[jax.Array, tuple]:
        variables = Variables(parameters, values.statistics)
        scores, statistics = network.apply(architecture, variables, images, train=True)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], 1)
        return -chosen.mean(), (scores, statistics)

    gradient = jax.value_and_grad(loss, has_aux=True)
    (value, (scores, statistics)), gradients = gradient(values.parameters)
    after = Variables(values.parameters, statistics)
    evaluation, same = network.apply(architecture, after, images, train=False)
    assert same is statistics or jax.tree.structure(same) == jax.tree.structure(statistics)
    return Step(value, scores, gradients, statistics, evaluation)


def images(shape: Shape, examples: int) -> jax.Array:
    size = (examples, shape.image, shape.image, shape.channels)
    return jnp.asarray(np.random.default_rng(0).normal(size=size), shape.dtype)


@functools.lru_cache(maxsize=8)
def shapes(static: Static, genotype: Genotype) -> Variables:
    """Return the shapes of a network's values; takes seconds for a large one."""
    return jax.eval_shape(static.init, static.encode(genotype), jax.random.key(0))


def shaken(static: Static, genotype: Genotype, seed: int = 0) -> Variables:
    """Return values that all differ, so that a mixed-up element shows."""
    rng = np.random.default_rng(seed)

    def parameter(path: tuple, a: Any) -> jax.Array:
        wide = 0.2 if path[-1].key in ("scale", "bias") else 1 / np.sqrt(np.prod(a.shape[:-1]))
        middle = float(path[-1].key == "scale")
        return jnp.asarray(middle + wide * rng.normal(size=a.shape), static.shape.dtype)

    def statistic(path: tuple, a: Any) -> jax.Array:
        draw = rng.normal(size=a.shape)
        return jnp.asarray(0.5 + draw**2 if path[-1].key == "var" else draw, static.shape.dtype)

    parameters, statistics = shapes(static, genotype)
    return Variables(
        jax.tree.map_with_path(parameter, parameters),
        jax.tree.map_with_path(statistic, statistics),
    )


class Pair:
    """Hold an interpreter, compiled only once, and the static builder of the same shape."""

    def __init__(self, interpreter: Interpreter, examples: int = 4) -> None:
        self.interpreter, self.static = interpreter, Static(interpreter.shape)
        self.images = images(interpreter.shape, examples)
        self.program: jax.stages.Compiled | None = None
        self.static_step = jax.jit(functools.partial(step, self.static))

    def interpreted_step(self, architecture: Any, values: Variables, images: jax.Array) -> Step:
        """Run the interpreter's step, by a program that is never compiled again."""
        if self.program is None:
            jitted = jax.jit(functools.partial(step, self.interpreter))
            self.program = jitted.lower(architecture, values, images).compile()
        return self.program(architecture, values, images)

    def both_steps(self, genotype: Genotype, draw: int = 0) -> tuple[Step, Step, PyTree]:
        """Return the interpreter's step in the static form, the static one, padding's gradients."""
        values = shaken(self.static, genotype, draw)
        architecture = self.interpreter.encode(genotype)
        computed = self.interpreted_step(
            architecture, from_static(self.interpreter, genotype, values), self.images
        )
        expected = self.static_step(self.static.encode(genotype), values, self.images)
        used = self.interpreter.used(architecture)
        padding = jax.tree.map(lambda g, u: g[np.asarray(u) == 0], computed.gradients, used)
        values_of_step = Variables(computed.gradients, computed.statistics)
        gradients, statistics = to_static(self.interpreter, genotype, values_of_step)
        return computed._replace(gradients=gradients, statistics=statistics), expected, padding

    def losses(self, genotype: Genotype, steps: int) -> tuple[list[float], list[float]]:
        """Return the losses of gradient descent by both builders, from the same values.

        The learning rate is small. Larger ones (0.01) are chaotic in some architectures: there the
        layers alone, from values changed in the last digit, differ by 1e-7 after ten steps.
        """
        values = shaken(self.static, genotype)
        own_values = from_static(self.interpreter, genotype, values)
        interpreted = self._train(
            self.interpreted_step, self.interpreter.encode(genotype), own_values, steps
        )
        return interpreted, self._train(
            self.static_step, self.static.encode(genotype), values, steps
        )

    def _train(self, run: Any, architecture: Any, values: Variables, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            computed = run(architecture, values, self.images)
            losses.append(float(computed.loss))
            parameters = jax.tree.map(
                lambda p, g: p - 0.001 * g, values.parameters, computed.gradients
            )
            values = Variables(parameters, computed.statistics)
        return losses


def assert_same(computed: Step, expected: Step, padding: object, tolerance: float) -> None:
    assert all((np.asarray(a) == 0).all() for a in jax.tree.leaves(padding))
    for name, a, b in zip(Step._fields, computed, expected, strict=True):
        floor = name == "gradients"
        assert_trees_close(*((floored(a, b), floored(b, b)) if floor else (a, b)), tolerance)


def floored(tree: object, expected: object) -> object:
    """Append a hundredth of the tree's largest element to every leaf, so that errors relate to it.

    In float32 the gradient of a scale that a later batch norm removes is only rounding.
    """
    least = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(expected)) * 1e-2
    return jax.tree.map(lambda a: np.append(np.ravel(a), least), tree)


def random_genotype(seed: int, space: NASNetSpace | None = None) -> Genotype:
    return (space or NASNetSpace()).random(Random(seed))
