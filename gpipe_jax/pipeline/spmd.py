"""Functions that all devices run as one program, each on its own stages."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from gpipe_jax.distributed.mesh import STAGE
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import Storage, to_block
from gpipe_jax.utils.trees import PyTree


def on_every_device(
    body: Callable, mesh: Mesh | AbstractMesh, in_specs: Any, out_specs: Any
) -> Callable:
    """`jax.shard_map` over all axes, without its check of which values differ between devices.

    The check would refuse any layer with a loop that starts from a constant (`nnx.RNN`), because
    the constant does not differ and the loop's result does. Nothing here relies on it: gradients
    are taken within a device, and the sums over devices are written out in `executor`.
    """
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def of_own_stage(stages: Stages, chunk: int, function: Callable[[int], PyTree]) -> PyTree:
    """Traced, on every device: `function(s)` of the device's own stage s in this chunk."""
    K = stages.num_devices
    kinds = stages.kind[chunk * K : (chunk + 1) * K]
    known = sorted(set(kinds))
    branch = jnp.asarray([known.index(kind) for kind in kinds])[lax.axis_index(STAGE)]
    return lax.switch(branch, [functools.partial(function, s) for s in known])


def build_arrays(
    stages: Stages, storages: Sequence[Storage], mesh: Mesh | AbstractMesh, make: Callable
) -> list[PyTree]:
    """Traced: the rectangular form of what `make(shape, layer id)` returns for each layer.

    Every device makes its own stages' layers and no others; see `Stages.build`.
    """

    def body(ids: jax.Array) -> list:
        build = lambda s: stages.build(storages, s, ids[0], make)  # noqa: E731
        chunks = [of_own_stage(stages, c, build) for c in range(stages.chunks)]
        return [to_block(arrays) for arrays in chunks]

    mapped = on_every_device(body, mesh, P(STAGE), P(STAGE))
    return mapped(jnp.asarray(stages.layer_ids()))


def mask_parameters(
    stages: Stages, mesh: Mesh | AbstractMesh, chosen: Callable[[tuple[int, ...]], bool]
) -> list[PyTree]:
    """Traced: which parameters are `chosen` by their shapes, in the rectangular form.

    A bool for a slot, of one shape, and arrays of bool for packs only.
    """

    def body() -> list:
        mask = lambda s: stages.params[stages.at(s)[0]].mask_packs(stages.at(s)[1], chosen)  # noqa: E731
        return [of_own_stage(stages, c, mask) for c in range(stages.chunks)]

    packs = on_every_device(body, mesh, (), P(STAGE))()
    slots = [[chosen(slot.shape) for slot in storage.slots] for storage in stages.params]
    return [{"slots": s, "packs": p} for s, p in zip(slots, packs, strict=True)]
