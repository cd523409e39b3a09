"""Provide a network that compiles at once, and searches that train it.

The toy network has a slot for each element of a genotype's normal cell: a hidden unit, if the
operation is no identity. Its architecture is data, as the interpreter's is.
"""

from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import nas
from nas.training.evaluator import TrainingEvaluator
from nas.training.network import Shape, Variables

SLOTS = 10


@dataclass(frozen=True)
class Toy:
    """Sum scores over the used hidden units, each of which reads all pixels.

    The units compute in the images' own type, which is that of the shape.
    """

    shape: Shape

    def encode(self, genotype) -> np.ndarray:
        elements = [element for pair in genotype.normal.pairs for element in pair]
        return np.array([name != "identity" for name, _ in elements], np.float32)

    def init(self, architecture, key) -> Variables:
        pixels = self.shape.image**2 * self.shape.channels
        a, b = jax.random.split(key)
        inner = jax.random.normal(a, (pixels, SLOTS)) / 8 * architecture
        outer = jax.random.normal(b, (SLOTS, self.shape.classes)) / 3 * architecture[:, None]
        return Variables({"inner": inner, "outer": outer}, {"mean": jnp.zeros(SLOTS)})

    def apply(self, architecture, values, images, *, train):
        p, s = values
        x = images.reshape(len(images), -1) @ p["inner"].astype(images.dtype)
        x = x.astype(jnp.float32)
        mean = x.mean(0) if train else s["mean"]
        scores = jnp.tanh(x - mean) * architecture @ p["outer"]
        return scores, {"mean": 0.9 * s["mean"] + 0.1 * mean} if train else s

    def used(self, architecture):
        pixels = self.shape.image**2 * self.shape.channels
        inner = jnp.broadcast_to(architecture, (pixels, SLOTS))
        outer = jnp.broadcast_to(architecture[:, None], (SLOTS, self.shape.classes))
        return {"inner": inner, "outer": outer}

    def inherit(self, child, parent, fresh, trained) -> Variables:
        both = child * parent > 0
        inner = jnp.where(both, trained.parameters["inner"], fresh.parameters["inner"])
        outer = jnp.where(both[:, None], trained.parameters["outer"], fresh.parameters["outer"])
        mean = jnp.where(both, trained.statistics["mean"], fresh.statistics["mean"])
        return Variables({"inner": inner, "outer": outer}, {"mean": mean})


@dataclass(frozen=True)
class ToyEvaluator(TrainingEvaluator):
    """Train toys as TrainingEvaluator trains networks."""

    name: str = field(default="toy")

    def network(self) -> Any:
        split = self.load_data()
        _, size, _, channels = split.images.shape
        sizes = (self.cells_per_stack, self.filters, size, channels, split.classes)
        return Toy(Shape(*sizes, dtype=self.dtype))


def toy(**options: Any) -> ToyEvaluator:
    defaults = {"epochs": 3, "examples": 256, "final_epochs": 1, "learning_rate": 0.05}
    return ToyEvaluator(**{**defaults, **options})


def job(number: int = 0, **options: Any) -> nas.Job:
    """Return a job with a random genotype."""
    genotype = nas.NASNetSpace().random(Random(number))
    return nas.Job(number, number, genotype, **{"seed": number, **options})


SMALL_SPACE = nas.NASNetSpace(pairs=2, operations=("identity", "sep_3x3", "max_pool_3x3"))


def small(**options: Any) -> TrainingEvaluator:
    """Return an evaluator with the interpreter, for a space and networks that compile quickly."""
    size = {"filters": 2, "examples": 64, "batch_size": 32, "validation_images": 40}
    return TrainingEvaluator(**{"epochs": 2, "final_epochs": 1, **size, **options})


def search(folder: Path, evaluate: Any = None, **options: Any) -> nas.Result:
    defaults = {"population": 6, "sample": 3, "cycles": 24, "space": nas.NASNetSpace()}
    return nas.search(evaluate=evaluate or toy(), folder=folder, **{**defaults, **options})


def trace(result: nas.Result) -> list[tuple]:
    """Return everything that a search has decided."""
    return [
        (row.id, row.architecture, row.parent, row.mutation, row.state, row.fitness)
        for row in result.reader.candidates()
    ]
