"""Run one program on all devices, each on its own stages."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gpipe_jax.distributed.mesh import PARAMS_SPEC, MeshLike, device_index
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.ragged.storage import Chosen, to_block
from gpipe_jax.utils.trees import PyTree


def on_every_device(body: Callable, mesh: MeshLike, in_specs: Any, out_specs: Any) -> Callable:
    """Apply `jax.shard_map` over all axes, without its check of which values vary across devices.

    The check rejects any layer with a loop that starts from a constant (`nnx.RNN`): the constant is
    the same on all devices, and the loop's result is not. The check is not needed, because
    gradients are taken within a device and `executor` writes out the sums over devices.
    """
    return jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def of_own_stage(stages: Stages, chunk: int, function: Callable[[int], PyTree]) -> PyTree:
    """Return `function(s)` of the device's own stage s in this chunk; traced, on every device."""
    K = stages.geometry.num_devices
    representatives = stages.representatives[chunk * K : (chunk + 1) * K]
    different = sorted(set(representatives))
    branches = jnp.asarray([different.index(s) for s in representatives])
    branch = branches[device_index()]
    return lax.switch(branch, [functools.partial(function, s) for s in different])


def build_arrays(
    stages: Stages, storage: ChunkedStorage, mesh: MeshLike, make: Callable
) -> list[PyTree]:
    """Build the arrays of all devices from `make(shape, layer id)`, a tree for each layer; traced.

    Every device makes the layers of its own stages only; see `ChunkedStorage.build`.
    """

    def body(ids: jax.Array) -> list:
        build = functools.partial(storage.build, ids=ids[0], make=make)
        chunks = [of_own_stage(stages, c, build) for c in range(stages.geometry.chunks)]
        return [to_block(arrays) for arrays in chunks]

    mapped = on_every_device(body, mesh, PARAMS_SPEC, PARAMS_SPEC)
    return mapped(jnp.asarray(stages.geometry.layer_ids()))


def mask_parameters(stages: Stages, mesh: MeshLike, chosen: Chosen) -> list[PyTree]:
    """Return which parameters are `chosen`, in the form of the parameters; traced.

    The mask of a slot is one bool, or one for each stage. The mask of a pack is an array of bool.
    """

    def mask(s: int) -> list[jax.Array]:
        c, k = stages.geometry.at(s)
        return stages.params[c].mask_packs(k, chosen)

    def body() -> list:
        return [of_own_stage(stages, c, mask) for c in range(stages.geometry.chunks)]

    packs = on_every_device(body, mesh, (), PARAMS_SPEC)()
    slots = [storage.mask_slots(chosen) for storage in stages.params]
    return [{"slots": s, "packs": p} for s, p in zip(slots, packs, strict=True)]
