"""Assign the layers of a network to stages, and the stages to devices.

A device holds V chunks. Each chunk is one of the K V stages. For K = 2 and V = 2:

    layer    0  1  2 | 3  4 | 5  6  7 | 8
    stage       0       1        2      3
    chunk       0       0        1      1      c = s div K
    device      0       1        0      1      k = s mod K

Letters: K devices, V chunks, k device, c chunk, s = c K + k stage.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gpipe_jax.layers.layer import Layer
from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.utils.trees import PyTree, same_shapes, signature, tree_bytes


class Run(NamedTuple):
    """Hold equal layers that follow each other within a stage."""

    layer: Layer
    start: int  # position of the first layer in the stage
    count: int
    scanned: bool  # True if the layers are one `lax.scan`


class Geometry:
    """Describe which layers, chunk and device belong to each stage.

    Args:
        shapes: The shapes of each layer of the network.
        layer_ranges: The layers of each stage; there are `chunks` times as many as devices.
        chunks: V, the number of stages on each device.
        longest_unrolled: The longest run of equal layers that is not a `lax.scan`.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        layer_ranges: Sequence[range],
        *,
        chunks: int = 1,
        longest_unrolled: int,
    ) -> None:
        self.shapes, self.layer_ranges, self.chunks = shapes, layer_ranges, chunks
        self.num_stages = len(layer_ranges)
        self.num_devices = self.num_stages // chunks
        self.runs = [_find_runs(shapes, layers, longest_unrolled) for layers in layer_ranges]

    @property
    def last(self) -> int:
        """Return the number of the last stage, K V - 1."""
        return self.num_stages - 1

    def at(self, s: int) -> tuple[int, int]:
        """Return (chunk, device) of stage s."""
        return divmod(s, self.num_devices)

    def input(self, s: int) -> Boundary:
        """Return the shapes of the boundary in front of stage s."""
        return self.shapes[self.layer_ranges[s][0]].boundary

    @functools.cached_property
    def extras(self) -> dict[str, PyTree]:
        """Return the shapes of the extras of a micro-batch."""
        return {name: a for shape in self.shapes for name, a in shape.extras.items()}

    def passing(self, s: int) -> set[str]:
        """Return the names of the skips that cross stage s unused."""
        popped = {name for run in self.runs[s] for name in run.layer.pops}
        return set(self.input(s).skips) - popped

    def run_shape(self, s: int, run: Run) -> LayerShape:
        """Return the shapes of each layer of a run of stage s."""
        return self.shapes[self.layer_ranges[s][run.start]]

    def ranges_of_device(self, k: int) -> Sequence[range]:
        """Return the layers of each chunk of device k."""
        return self.layer_ranges[k :: self.num_devices]

    def layers_of_device(self, k: int) -> list[int]:
        """Return the global ids of device k's layers, in all its chunks."""
        return [i for layers in self.ranges_of_device(k) for i in layers]

    def layer_ids(self) -> np.ndarray:
        """Return the global ids of each stage's layers, int32 [K, V, longest stage].

        Shorter stages are padded with zeros.
        """
        longest = max(map(len, self.layer_ranges))
        ids = np.zeros((self.num_devices, self.chunks, longest), np.int32)
        for s, layers in enumerate(self.layer_ranges):
            c, k = self.at(s)
            ids[k, c, : len(layers)] = layers
        return ids

    def parameter_bytes(self, k: int) -> int:
        """Return the bytes of device k's own parameters and constants, without padding."""
        shapes = [self.shapes[i] for i in self.layers_of_device(k)]
        return sum(tree_bytes((shape.params, shape.fixed)) for shape in shapes)


def _find_runs(shapes: Sequence[LayerShape], layers: range, longest_unrolled: int) -> list[Run]:
    """Group the layers of a stage into runs."""
    runs = []
    for _, group in itertools.groupby(layers, key=lambda i: _run_key(shapes, i)):
        ids = list(group)
        scanned = len(ids) > longest_unrolled
        runs.append(Run(shapes[ids[0]].layer, ids[0] - layers[0], len(ids), scanned))
    return runs


def _run_key(shapes: Sequence[LayerShape], i: int) -> tuple:
    """Return a key that is equal for neighbouring layers of one run.

    Layers of a run are equal, train the same parameters, and their outputs are like their inputs. A
    layer with skips or ties is a run of its own, because its names differ from those of its equals.
    """
    shape = shapes[i]
    linked = shape.layer.stashes or shape.layer.pops or shape.layer.ties
    alone = linked or not same_shapes(shape.input, shape.output)
    return shape.layer, signature(shape.params), i if alone else -1
