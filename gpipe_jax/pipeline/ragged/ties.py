"""Share tied parameters between devices: one device stores each of them, all devices use it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from gpipe_jax.distributed.mesh import device_index, sum_over_stages
from gpipe_jax.layers import skips_and_ties
from gpipe_jax.pipeline.ragged.chunked_storage import ChunkedStorage
from gpipe_jax.pipeline.ragged.packing import LeafPlace


class Owner(NamedTuple):
    """Say where a tied parameter is stored."""

    stage: int
    place: LeafPlace


class Ties:
    """Gather the tied parameters of a network, and add up their gradients.

    The first layer that has a tied parameter owns it.

    Args:
        params: How parameters are stored.
        part: The part of each layer's stored tree that is its parameters. Default: all of it.
    """

    def __init__(self, params: ChunkedStorage, part: str | None = None) -> None:
        self.params = params
        self.owners = _find_owners(params, part)  # by the name of the tie

    def gather(self, params: list) -> dict[str, jax.Array]:
        """Return the tied parameters on every device, traced; `params` are a device's arrays."""
        return {name: self._gather(owner, params) for name, owner in self.owners.items()}

    def _gather(self, owner: Owner, params: list) -> jax.Array:
        c, k = self.params.geometry.at(owner.stage)
        value = self.params[c].read_leaf(owner.place, params[c])
        is_owner = device_index() == k
        return sum_over_stages(jnp.where(is_owner, value, jnp.zeros_like(value)))

    def add(self, grads: list, shared: dict) -> list:
        """Add all devices' gradients of tied parameters to the owners' `grads`, traced."""
        grads = list(grads)
        for name, owner in self.owners.items():
            c, k = self.params.geometry.at(owner.stage)
            total = sum_over_stages(shared[name])
            own = jnp.where(device_index() == k, total, jnp.zeros_like(total))
            grads[c] = self.params[c].add_leaf(owner.place, grads[c], own)
        return grads

    def bytes(self, least_itemsize: int = 0) -> int:
        """Return the bytes of the copies that every device has during a step.

        Each element counts at least `least_itemsize` bytes: gradients have 4.
        """
        places = [owner.place for owner in self.owners.values()]
        return sum(place.size * max(place.dtype.itemsize, least_itemsize) for place in places)


def _find_owners(params: ChunkedStorage, part: str | None) -> dict[str, Owner]:
    owners: dict[str, Owner] = {}
    for s in params.stages:
        for run, group in zip(params.geometry.runs[s], params.groups(s), strict=True):
            if run.layer.ties:
                places = jax.tree.unflatten(group.treedef, group.places)
                places = places if part is None else getattr(places, part)
                offered = skips_and_ties.offered(run.layer, places)
                owners.update({name: Owner(s, place) for name, place in offered.items()})
    return owners
