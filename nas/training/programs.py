"""The three programs of a training: start, one epoch, and validation.

    state, parameters = start(architecture, seed)
    for each epoch:
        state, loss = epoch(state, architecture, plan, images, labels)
    accuracy = validate(architecture, state.values, held_images, held_labels)

An epoch is one `lax.scan`, so that Python is not in the loop. They are compiled ahead of their
first use, once for each device; with the interpreter that is all, as the architecture and the plan
are data. Letters: N images, B images of a batch.
"""

import functools
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from gpipe_jax.utils.text import format_bytes
from nas.errors import TooLargeError
from nas.training.datasets import Data, Split
from nas.training.network import Architecture, Network, PyTree, Variables
from nas.training.recipe import Plan, Recipe, rate

Device = Any  # jax.Device, which is no type to type checkers

VALIDATION_BATCH = 256  # at most


class State(NamedTuple):
    """What training changes."""

    values: Variables
    momentum: PyTree  # the optimizer's state
    step: jax.Array


# --- as functions ---------------------------------------------------------------------------------


def start(network: Network, recipe: Recipe, architecture: Architecture, seed: Any) -> tuple:
    """A fresh state, and the number of parameters that the architecture uses."""
    values = network.init(architecture, jax.random.fold_in(jax.random.key(seed), 0))
    size = sum(a.sum(dtype=jnp.float32) for a in jax.tree.leaves(network.used(architecture)))
    return fresh(recipe, values), size


def fresh(recipe: Recipe, values: Variables) -> State:
    """The state at the first step, from these values."""
    return State(values, recipe.optimizer.init(values.parameters), jnp.zeros((), jnp.int32))


def epoch(
    network: Network,
    recipe: Recipe,
    state: State,
    architecture: Architecture,
    plan: Plan,
    images_N: jax.Array,
    labels_N: jax.Array,
) -> tuple[State, jax.Array]:
    """The state after each batch has been seen, in a new order, and the mean loss.

    What does not fill a batch is left out, other images in each epoch.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(plan.seed), 1), state.step)
    order, chance = jax.random.split(key)
    B, N = recipe.batch_size, len(labels_N)
    index_SB = jax.random.permutation(order, N)[: N // B * B].reshape(-1, B)
    used = network.used(architecture)

    def step(state: State, index_B: jax.Array) -> tuple[State, jax.Array]:
        images = recipe.augmentation(images_N[index_B], jax.random.fold_in(chance, state.step))

        def loss(parameters: PyTree) -> tuple[jax.Array, PyTree]:
            values = state.values._replace(parameters=parameters)
            scores, statistics = network.apply(architecture, values, images, train=True)
            return recipe.loss(scores, labels_N[index_B]), statistics

        parameters = state.values.parameters
        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, momentum = recipe.optimizer.update(
            gradients, state.momentum, parameters, decaying=used
        )
        now = rate(plan, state.step)
        moved = jax.tree.map(lambda p, u: p - now.astype(p.dtype) * u, parameters, updates)
        return State(Variables(moved, statistics), momentum, state.step + 1), value

    state, losses = jax.lax.scan(step, state, index_SB)
    return state, losses.mean()


def validate(
    network: Network,
    architecture: Architecture,
    values: Variables,
    images_N: jax.Array,
    labels_N: jax.Array,
) -> jax.Array:
    """The fraction of the images that are classified rightly; NaN if any score is not finite."""
    batches = -(-len(labels_N) // VALIDATION_BATCH)
    B = -(-len(labels_N) // batches)
    pad = batches * B - len(labels_N)
    images = jnp.pad(images_N, ((0, pad), (0, 0), (0, 0), (0, 0))).reshape(
        -1, B, *images_N.shape[1:]
    )
    labels = jnp.pad(labels_N, (0, pad), constant_values=-1).reshape(-1, B)

    def hits(_: None, batch: tuple) -> tuple[None, tuple[jax.Array, jax.Array]]:
        scores, _ = network.apply(architecture, values, batch[0], train=False)
        return None, ((scores.argmax(-1) == batch[1]).sum(), jnp.isfinite(scores).all())

    _, (found, finite) = jax.lax.scan(hits, None, (images, labels))
    return jnp.where(finite.all(), found.sum() / len(labels_N), jnp.nan)


# --- compiled -------------------------------------------------------------------------------------


class Programs(NamedTuple):
    """Of one network on one device; with `Static`, of one architecture."""

    start: Callable
    epoch: Callable
    validate: Callable
    inherit: Callable
    batch_size: int
    split: Split  # on the device, as are all results


KEPT = 32
"""Of so many networks, or single architectures; those used least recently go, on all devices."""


class _Key(NamedTuple):
    """What programs are compiled for."""

    network: Network
    recipe: Recipe
    structure: Any  # of an architecture; with `Static` it holds the architecture itself
    leaves: tuple  # shapes and types of its data
    data: Data
    device: Device


_programs: dict[_Key, Programs | TooLargeError] = {}  # the one used last at its end
_lock = threading.Lock()  # of that
_compiling: dict[_Key, threading.Lock] = {}  # of those that are being compiled


def get(
    network: Network, recipe: Recipe, architecture: Architecture, data: Data
) -> tuple[Programs, bool]:
    """The programs for this thread's device, and whether they have been compiled now.

    TooLargeError if the device has too little memory for them, which is found out but once.
    """
    device = this_device()
    like = lambda a: jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype)  # noqa: E731
    leaves, structure = jax.tree.flatten(jax.tree.map(like, architecture))
    key = _Key(network, recipe, structure, tuple(leaves), data, device)
    if found := _kept(key):  # without a wait for what others compile
        return found, False
    with _lock:
        compiling = _compiling.setdefault(key, threading.Lock())
    with compiling:  # of several threads that need it one compiles
        if found := _kept(key):
            return found, False
        try:
            made = _compiled(network, recipe, jax.tree.unflatten(structure, leaves), data)
        except TooLargeError as error:
            _keep(key, TooLargeError(*error.args))  # without its frames
            raise
        _keep(key, made)
        return made, True


def _kept(key: _Key) -> Programs | None:
    with _lock:
        found = _programs.pop(key, None)
        if found:
            _programs[key] = found
    if isinstance(found, TooLargeError):
        raise TooLargeError(*found.args)
    return found


def _keep(key: _Key, made: Programs | TooLargeError) -> None:
    with _lock:
        _compiling.pop(key, None)  # those that wait have it
        _programs[key] = made
        for oldest in [*dict.fromkeys(map(_anywhere, reversed(_programs)))][KEPT:]:
            for other in [other for other in _programs if _anywhere(other) == oldest]:
                del _programs[other]


def _anywhere(key: _Key) -> _Key:
    """The same for all devices, however many there are."""
    return key._replace(device=None)


def this_device() -> Device:
    """Where this thread computes."""
    chosen: Any = getattr(jax.config, "jax_default_device")  # noqa: B009  # unknown to its stubs
    if isinstance(chosen, str):  # a platform
        return jax.local_devices(backend=chosen)[0]
    return chosen or jax.local_devices()[0]


@functools.lru_cache(maxsize=32)
def _on_device(data: Data, dtype: str, device: Device) -> Split:
    found = data.split()
    cast = [a.astype(dtype) if a.dtype == np.float32 else a for a in found]
    return Split(*(jax.device_put(a, device) for a in cast))  # type: ignore[arg-type]


def _compiled(network: Network, recipe: Recipe, architecture: Architecture, data: Data) -> Programs:
    device = this_device()
    here = SingleDeviceSharding(device)
    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)  # noqa: E731
    split = _on_device(data, network.shape.dtype, device)
    architecture = jax.tree.map(like, architecture)
    seed = jax.ShapeDtypeStruct((), np.uint32, sharding=here)
    number = jax.ShapeDtypeStruct((), np.float32, sharding=here)
    plan = Plan(seed, number, number, number)
    images, labels, held_images, held_labels = map(like, split)

    first, one, check = _functions(network, recipe)
    state, _ = jax.tree.map(like, jax.eval_shape(first, architecture, seed))
    train = one.lower(state, architecture, plan, images, labels).compile()
    check_memory(train, device, split)
    return Programs(
        first.lower(architecture, seed).compile()
        if jax.tree.leaves(architecture)
        # Of one architecture it is run but once, which its parts, shared with others, do sooner.
        else functools.partial(start, network, recipe),
        train,
        check.lower(architecture, state.values, held_images, held_labels).compile(),
        jax.jit(network.inherit),
        recipe.batch_size,
        split,
    )


@functools.lru_cache(maxsize=8)
def _functions(network: Network, recipe: Recipe) -> tuple[Any, Any, Any]:
    """The same objects for every device, so that JAX traces them once."""
    return (
        jax.jit(functools.partial(start, network, recipe)),
        jax.jit(functools.partial(epoch, network, recipe), donate_argnums=0),
        jax.jit(functools.partial(validate, network)),
    )


# --- memory ---------------------------------------------------------------------------------------


def check_memory(program: Any, device: Device, split: Split) -> None:
    """Raise TooLargeError if the device cannot hold a training: known before it is tried."""
    analysis = program.memory_analysis()
    if analysis is None:
        return
    need = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes
    need += sum(a.nbytes for a in split[2:])
    have = memory_of(device)
    if need > have:
        raise TooLargeError(
            f"training needs {format_bytes(need)} and {device} has {format_bytes(have)}: give "
            "a smaller batch_size, fewer filters or cells, or dtype bfloat16"
        )


def memory_of(device: Device) -> int:
    """Bytes: the device's own, or the host's where it has none."""
    known = device.memory_stats() or {}
    return known.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
