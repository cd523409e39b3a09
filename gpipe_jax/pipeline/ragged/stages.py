"""Describe a network that is divided into stages, each with layers and arrays of its own.

    geometry          which layers, device and chunk belong to each stage
    params, stats     the arrays for trained parameters and running statistics (`chunked_storage`)
    fixed             the arrays that never change: frozen parameters and constants
    ties              which device stores each tied parameter that is trained
    frozen_ties       likewise for those that are frozen
    boundary_format   the arrays that pass between stages

Only the modules of this folder know that stages differ.
"""

import functools
from collections.abc import Sequence

import jax

from gpipe_jax.layers import skips_and_ties
from gpipe_jax.layers.shape_inference import LayerShape
from gpipe_jax.pipeline import remat as remats
from gpipe_jax.pipeline.ragged.boundary import BoundaryFormat
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.pipeline.ragged.geometry import Geometry
from gpipe_jax.pipeline.ragged.ties import Ties
from gpipe_jax.pipeline.remat import Remat
from gpipe_jax.utils.trees import signature


class Stages:
    """Hold the geometry, the storage and the ties of a network's stages.

    Args:
        shapes: The shapes of each layer of the network.
        layer_ranges: The layers of each stage; there are `chunks` times as many as devices.
        chunks: V, the number of stages on each device.
        remat: What the backward pass of a stage recomputes.
        only: The one stage to store, as if it had every device to itself; None stores all stages.

    Attributes:
        representatives: For each stage the first stage that runs the same code.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        layer_ranges: Sequence[range],
        *,
        chunks: int = 1,
        remat: Remat = remats.STAGE,
        only: int | None = None,
    ) -> None:
        self.remat = remat
        longest = remat.longest_unrolled
        self.geometry = Geometry(shapes, layer_ranges, chunks=chunks, longest_unrolled=longest)
        later = range(1, self.geometry.num_stages)
        self.boundary_format = BoundaryFormat([self.geometry.input(s) for s in later])
        self.params = ChunkedStorage(self.geometry, [a.params for a in shapes], only=only)
        self.stats = ChunkedStorage(self.geometry, [a.stats for a in shapes], only=only)
        self.fixed = ChunkedStorage(self.geometry, [a.fixed for a in shapes], only=only)
        self.ties = Ties(self.params)
        self.frozen_ties = Ties(self.fixed, "params")
        first: dict = {}
        self.representatives = [
            first.setdefault(self._code_key(s), s) for s in range(self.geometry.num_stages)
        ]

    def _code_key(self, s: int) -> tuple:
        """Return a key that is equal for stages with the same code.

        Such stages have equal layers, inputs and places of their arrays. They belong to the same
        chunk, because chunks have arrays of their own. The first and the last stage stand alone.
        """
        geometry = self.geometry
        (c, _), ends = geometry.at(s), (s == 0, s == geometry.last)
        layers = tuple((run.layer, run.count) for run in geometry.runs[s])
        groups = [storage.groups(s) for storage in (self.params, self.stats, self.fixed)]
        return c, ends, signature(geometry.input(s)), layers, tuple(groups)

    def commit(self, s: int, stats: dict, moments: dict) -> dict:
        """Return stage s's running statistics after a step, as one chunk's arrays on its device.

        `moments` are the means over the step, in the form of the statistics.
        """
        c, k = self.geometry.at(s)
        storage = self.stats[c]
        trees = zip(storage.read(k, stats), storage.read(k, moments), strict=True)
        committed = []
        for run, (old, mean) in zip(self.geometry.runs[s], trees, strict=True):
            commit = functools.partial(skips_and_ties.commit, run.layer)
            if run.scanned:
                committed.append(jax.vmap(commit)(old, mean) if jax.tree.leaves(old) else old)
            else:
                committed.append([commit(a, b) for a, b in zip(old, mean, strict=True)])
        return storage.write(k, committed)
