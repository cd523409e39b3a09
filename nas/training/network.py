"""What a candidate is to its training: a function of architecture, values and images.

There are two builders of the same function. `Static` makes the pipeline's own layers, and JAX
compiles each architecture anew; with `Interpreter` the architecture is data, and one program runs
them all. A training loop need not know which of them it has:

    network = Interpreter(Shape(cells_per_stack=1, filters=8, image=8, channels=1, classes=10))
    architecture = network.encode(genotype)
    values = network.init(architecture, key)
    scores, statistics = network.apply(architecture, values, images, train=True)

All but `encode` can be traced, architectures being pytrees: of small integer arrays for the
interpreter; without leaves for `Static`, so that `jax.jit` compiles each of them by itself.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax

from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.utils.trees import PyTree

Architecture = Any
"""A pytree that says which network: what `encode` returns."""


@dataclass(frozen=True)
class Shape:
    """The size of the networks of a search; the words are those of `gpipe_jax.zoo.amoebanet.network`."""

    cells_per_stack: int  # normal cells in each of the three stacks (N)
    filters: int  # of the first stack (F)
    image: int  # height and width
    channels: int  # of an image
    classes: int
    stem: str = "cifar"
    dtype: str = "float32"  # to compute in; parameters and scores are float32
    batch_norm_momentum: float = 0.9  # decay of the running statistics, once a step


class Variables(NamedTuple):
    """What a network has learned."""

    parameters: PyTree
    statistics: PyTree  # the running ones of batch norms


class Network(Protocol):
    """A builder of networks of one shape."""

    @property
    def shape(self) -> Shape:
        """Of all its networks."""
        ...

    def encode(self, genotype: Genotype) -> Architecture:
        """The genotype as the other methods take it; ValueError if the builder can't make it."""
        ...

    def init(self, architecture: Architecture, key: jax.Array) -> Variables:
        """Fresh values."""
        ...

    def apply(
        self, architecture: Architecture, values: Variables, images: jax.Array, *, train: bool
    ) -> tuple[jax.Array, PyTree]:
        """Scores [B, classes] of images [B, H, W, C], and the statistics after this call.

        In training batch norms use this batch's statistics and move the running ones towards them;
        else they use the running ones, which are returned as they were.
        """
        ...

    def used(self, architecture: Architecture) -> PyTree:
        """Like the parameters: 1 for each entry that the network has, 0 for padding.

        The sum of it all is the size of the network. Padding has gradient zero; it should have no
        weight decay either, and no part in norms.
        """
        ...

    def inherit(
        self, child: Architecture, parent: Architecture, fresh: Variables, trained: Variables
    ) -> Variables:
        """`fresh` values of a child, but its parent's `trained` ones where slot and shape agree."""
        ...
