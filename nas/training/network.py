"""Define what a builder of networks is: a function of architecture, values and images.

There are two builders of the same function. `Static` makes the pipeline's own layers, and JAX
compiles each architecture separately. For `Interpreter` the architecture is data, and one program
runs all architectures. A training loop does not depend on which of them it has:

    network = Interpreter(Shape(cells_per_stack=1, filters=8, image=8, channels=1, classes=10))
    architecture = network.encode(genotype)
    values = network.init(architecture, key)
    scores, statistics = network.apply(architecture, values, images, train=True)

All methods but `encode` can be traced, because architectures are pytrees. That of the interpreter
has small integer arrays. That of `Static` has no leaves, so `jax.jit` compiles each one separately.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.utils.trees import PyTree

Architecture = Any
"""A pytree that selects a network: the result of `Network.encode`."""


@dataclass(frozen=True)
class Shape:
    """Hold the size of the networks of a search; the names are those of `zoo.amoebanet.network`."""

    cells_per_stack: int  # normal cells in each of the three stacks (N)
    filters: int  # of the first stack (F)
    image: int  # height and width of an image in pixels
    channels: int  # of an image
    classes: int
    stem: str = "cifar"
    dtype: str = "float32"  # of the computation; parameters and scores are float32
    batch_norm_momentum: float = 0.9  # decay of the running statistics per step


class Variables(NamedTuple):
    """Hold the weights of a network."""

    parameters: PyTree
    statistics: PyTree  # running statistics of batch norms


class Network(Protocol):
    """Build networks of one shape."""

    @property
    def shape(self) -> Shape:
        """Return the size of the networks."""
        ...

    def encode(self, genotype: Genotype) -> Architecture:
        """Return the architecture of a genotype.

        Raises:
            ValueError: There is no such network.
        """
        ...

    def init(self, architecture: Architecture, key: jax.Array) -> Variables:
        """Draw initial values."""
        ...

    def apply(
        self, architecture: Architecture, values: Variables, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        """Return scores [B, classes] of images [B, H, W, C], and the new statistics.

        In training, batch norms use the statistics of this batch and move the running ones towards
        them. Otherwise they use the running ones, which are returned unchanged.
        """
        ...

    def used(self, architecture: Architecture) -> PyTree:
        """Return a tree like the parameters: 1 for each that the network uses, 0 for padding.

        Its sum is the size of the network. Padding has gradient zero. It must have no weight decay,
        and must not count in norms.
        """
        ...

    def inherit(
        self, child: Architecture, parent: Architecture, fresh: Variables, trained: Variables
    ) -> Variables:
        """Return the parent's weights where slot and shape agree, else the fresh values."""
        ...
