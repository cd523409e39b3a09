"""Compile the three programs of a training: start, one epoch, and validation.

    state, parameters = start(architecture, seed)
    for each epoch:
        state, loss = epoch(state, architecture, scalars, images, labels)
    accuracy = validate(architecture, state.values, held_images, held_labels)

An epoch is one `lax.scan`, so that no Python runs within it. The programs are compiled ahead of
their first use, once for each device. With the interpreter that is all, because architecture and
scalars are data. Letters: N images, B images of a batch.
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

from gpipe_jax.layers.numeric_settings import cached_by_settings, numeric_settings
from gpipe_jax.utils.text import format_bytes
from gpipe_jax.utils.xla_workarounds import jax_setting
from nas.errors import TooLargeError
from nas.training.datasets import Data, Split
from nas.training.network import Architecture, Network, PyTree, Variables
from nas.training.recipe import Recipe, Scalars, learning_rate

Device = Any  # jax.Device, which type checkers do not accept as a type

MAX_VALIDATION_BATCH = 256  # images


class State(NamedTuple):
    """Hold what a training step changes."""

    values: Variables
    opt_state: PyTree
    step: jax.Array


# --- as functions ---------------------------------------------------------------------------------


def start(network: Network, recipe: Recipe, architecture: Architecture, seed: Any) -> tuple:
    """Return the initial state, and the number of parameters that the architecture uses."""
    values = network.init(architecture, jax.random.fold_in(jax.random.key(seed), 0))
    size = sum(a.sum(dtype=jnp.float32) for a in jax.tree.leaves(network.used(architecture)))
    return fresh(recipe, values), size


def fresh(recipe: Recipe, values: Variables) -> State:
    """Return the state of the first step, from these values."""
    return State(values, recipe.optimizer.init(values.parameters), jnp.zeros((), jnp.int32))


def epoch(
    network: Network,
    recipe: Recipe,
    state: State,
    architecture: Architecture,
    scalars: Scalars,
    images_N: jax.Array,
    labels_N: jax.Array,
) -> tuple[State, jax.Array]:
    """Train on every batch once, in a random order; return the new state and the mean loss.

    If the last batch is not full, it is left out. Because the order is random, other images are
    left out in each epoch.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(scalars.seed), 1), state.step)
    order_key, augmentation_key = jax.random.split(key)
    B, N = recipe.batch_size, len(labels_N)
    index_SB = jax.random.permutation(order_key, N)[: N // B * B].reshape(-1, B)
    used = network.used(architecture)

    def step(state: State, index_B: jax.Array) -> tuple[State, jax.Array]:
        step_key = jax.random.fold_in(augmentation_key, state.step)
        images = recipe.augmentation(images_N[index_B], step_key)

        def loss(parameters: PyTree) -> tuple[jax.Array, PyTree]:
            values = state.values._replace(parameters=parameters)
            scores, statistics = network.apply(architecture, values, images, train=True)
            return recipe.loss(scores, labels_N[index_B]), statistics

        parameters = state.values.parameters
        (value, statistics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, opt_state = recipe.optimizer.update(
            gradients, state.opt_state, parameters, decaying=used
        )
        rate = learning_rate(scalars, state.step)
        parameters = jax.tree.map(lambda p, u: p - rate.astype(p.dtype) * u, parameters, updates)
        return State(Variables(parameters, statistics), opt_state, state.step + 1), value

    state, losses = jax.lax.scan(step, state, index_SB)
    return state, losses.mean()


def validate(
    network: Network,
    architecture: Architecture,
    values: Variables,
    images_N: jax.Array,
    labels_N: jax.Array,
) -> jax.Array:
    """Return the fraction of images classified right, or NaN if any score is not finite."""
    batches = -(-len(labels_N) // MAX_VALIDATION_BATCH)
    B = -(-len(labels_N) // batches)
    pad = batches * B - len(labels_N)
    images = jnp.pad(images_N, ((0, pad), (0, 0), (0, 0), (0, 0))).reshape(
        -1, B, *images_N.shape[1:]
    )
    labels = jnp.pad(labels_N, (0, pad), constant_values=-1).reshape(-1, B)

    def count_right(_: None, batch: tuple) -> tuple[None, tuple[jax.Array, jax.Array]]:
        scores, _ = network.apply(architecture, values, batch[0], train=False)
        return None, ((scores.argmax(-1) == batch[1]).sum(), jnp.isfinite(scores).all())

    _, (right, is_finite) = jax.lax.scan(count_right, None, (images, labels))
    return jnp.where(is_finite.all(), right.sum() / len(labels_N), jnp.nan)


# --- compiled -------------------------------------------------------------------------------------


class Programs(NamedTuple):
    """Hold the programs of one network on one device; with `Static`, of one architecture."""

    start: Callable
    epoch: Callable
    validate: Callable
    inherit: Callable
    batch_size: int
    split: Split  # on the device, as all results are


MAX_KEPT = 32
"""Networks (with `Static`, architectures) whose programs are kept; the least recently used go."""


class _Key(NamedTuple):
    """Identify what programs are compiled for."""

    network: Network
    recipe: Recipe
    structure: Any  # tree structure of an architecture; that of `Static` holds the architecture
    leaves: tuple  # shapes and types of an architecture's arrays
    data: Data
    settings: tuple  # of JAX: compiled programs have the types and the precision of theirs
    device: Device


_programs: dict[_Key, Programs | TooLargeError] = {}  # the most recently used last
_lock = threading.Lock()  # of the two dictionaries
_compiling: dict[_Key, threading.Lock] = {}  # held while programs are compiled


def get(
    network: Network, recipe: Recipe, architecture: Architecture, data: Data
) -> tuple[Programs, bool]:
    """Return the programs for this thread's device, and whether this call compiled them.

    Raises:
        TooLargeError: The device has too little memory; this is found out only once.
    """
    device = this_device()

    def shape_of(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(a), np.asarray(a).dtype)

    leaves, structure = jax.tree.flatten(jax.tree.map(shape_of, architecture))
    key = _Key(network, recipe, structure, tuple(leaves), data, numeric_settings(), device)
    if programs := _look_up(key):  # does not wait while other programs are compiled
        return programs, False
    with _lock:
        compiling = _compiling.setdefault(key, threading.Lock())
    with compiling:  # one of the threads that need the programs compiles them
        if programs := _look_up(key):
            return programs, False
        try:
            programs = _compile(network, recipe, jax.tree.unflatten(structure, leaves), data)
        except TooLargeError as error:
            _store(key, TooLargeError(*error.args))  # without its frames
            raise
        _store(key, programs)
        return programs, True


def _look_up(key: _Key) -> Programs | None:
    with _lock:
        stored = _programs.pop(key, None)
        if stored:
            _programs[key] = stored  # now the most recently used
    if isinstance(stored, TooLargeError):
        raise TooLargeError(*stored.args)
    return stored


def _store(key: _Key, programs: Programs | TooLargeError) -> None:
    with _lock:
        _compiling.pop(key, None)  # threads that wait hold a reference
        _programs[key] = programs
        recent_first = [*dict.fromkeys(map(_without_device, reversed(_programs)))]
        for oldest in recent_first[MAX_KEPT:]:
            for other in [other for other in _programs if _without_device(other) == oldest]:
                del _programs[other]


def _without_device(key: _Key) -> _Key:
    """Return a key that the programs of all devices share."""
    return key._replace(device=None)


def this_device() -> Device:
    """Return the device that this thread computes on."""
    chosen = jax_setting("jax_default_device")
    if isinstance(chosen, str):  # a platform
        return jax.local_devices(backend=chosen)[0]
    return chosen or jax.local_devices()[0]


@cached_by_settings(maxsize=32)
def _on_device(data: Data, dtype: str, device: Device) -> Split:
    cast = [a.astype(dtype) if a.dtype == np.float32 else a for a in data.split()]
    return Split(*(jax.device_put(a, device) for a in cast))  # type: ignore[arg-type]


def _compile(network: Network, recipe: Recipe, architecture: Architecture, data: Data) -> Programs:
    device = this_device()
    sharding = SingleDeviceSharding(device)

    def shape_of(a: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    split = _on_device(data, network.shape.dtype, device)
    architecture = jax.tree.map(shape_of, architecture)
    seed = jax.ShapeDtypeStruct((), np.uint32, sharding=sharding)
    number = jax.ShapeDtypeStruct((), np.float32, sharding=sharding)
    scalars = Scalars(seed, number, number, number)
    images, labels, held_images, held_labels = map(shape_of, split)

    start_program, epoch_program, validate_program = _jitted(network, recipe)
    state, _ = jax.tree.map(shape_of, jax.eval_shape(start_program, architecture, seed))
    train = epoch_program.lower(state, architecture, scalars, images, labels).compile()
    check_memory(train, device, split)
    if jax.tree.leaves(architecture):
        compiled_start = start_program.lower(architecture, seed).compile()
    else:
        # The program of one architecture would run only once. Its operations, which others share,
        # are quicker to compile one by one.
        compiled_start = functools.partial(start, network, recipe)
    return Programs(
        compiled_start,
        train,
        validate_program.lower(architecture, state.values, held_images, held_labels).compile(),
        jax.jit(network.inherit),
        recipe.batch_size,
        split,
    )


@functools.lru_cache(maxsize=8)
def _jitted(network: Network, recipe: Recipe) -> tuple[Any, Any, Any]:
    """Return start, epoch and validate, the same objects for all devices, traced only once."""
    return (
        jax.jit(functools.partial(start, network, recipe)),
        jax.jit(functools.partial(epoch, network, recipe), donate_argnums=0),
        jax.jit(functools.partial(validate, network)),
    )


# --- memory ---------------------------------------------------------------------------------------


def check_memory(program: Any, device: Device, split: Split) -> None:
    """Raise TooLargeError if the device cannot hold a training, before it is tried."""
    analysis = program.memory_analysis()
    if analysis is None:
        return
    held_out = split.held_images.nbytes + split.held_labels.nbytes
    needed = analysis.temp_size_in_bytes + analysis.argument_size_in_bytes + held_out
    available = memory_of(device)
    if needed > available:
        raise TooLargeError(
            f"training needs {format_bytes(needed)} and {device} has {format_bytes(available)}; "
            "use a smaller batch_size, fewer filters or cells, or dtype bfloat16"
        )


def memory_of(device: Device) -> int:
    """Return the device's memory in bytes, or the host's if it has none of its own."""
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
