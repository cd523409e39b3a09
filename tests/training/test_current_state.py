"""Check the errors for a state that is given to the wrong function, or to another trainer."""

import re

import jax
import numpy as np
import optax
import pytest
from dense import make_batch, make_pipe

import gpipe_jax as gpipe
from gpipe_jax.errors import ArgumentError

BATCH = make_batch(0)


@pytest.fixture(scope="module")
def trainer() -> gpipe.Trainer:
    return gpipe.Trainer(make_pipe(K=2), optax.adam(1e-2), ema=0.9)


@pytest.fixture(scope="module")
def current(trainer) -> gpipe.TrainState:
    return trainer.init(0)


WANT_STATE = {
    "predict": lambda t, state: t.pipe.predict(state, BATCH["inputs"]),
    "value_and_grad": lambda t, state: t.pipe.value_and_grad(state, BATCH),
    "with extras": lambda t, state: t.pipe.value_and_grad_with_extras(state, BATCH, []),
    "evaluate": lambda t, state: t.pipe.evaluate(state, BATCH),
    "to_layers": lambda t, state: t.pipe.to_layers(state),
    "statistics": lambda t, state: t.pipe.statistics(state),
    "to_module": lambda t, state: t.pipe.to_module(state),
    "Trainer.evaluate": lambda t, state: t.evaluate(state, [BATCH]),
    "Trainer.start": lambda t, state: t.start(state),
}
WANT_TRAIN_STATE = {
    "save": lambda t, current: t.save("never", current),
    "evaluated": lambda t, current: t.evaluated(current),
    "step": lambda t, current: t.step(current, BATCH),
    "to_layers": lambda t, current: t.to_layers(current),
    "fit": lambda t, current: t.fit(current, [BATCH]),
}


@pytest.mark.parametrize("call", WANT_STATE.values(), ids=WANT_STATE)
def test_a_training_state_where_a_state_is_wanted(trainer, current, call):
    """Refuse it, and a state whose arrays a step has taken."""
    remedy = re.escape("give `current.state`, or `trainer.evaluated(current)`")
    with pytest.raises(ArgumentError, match=f"`state` must be a State, got a TrainState; {remedy}"):
        call(trainer, current)
    array = jax.numpy.zeros(1)
    array.delete()
    taken = current.state._replace(params=array)
    with pytest.raises(ArgumentError, match="`state` has been updated in place by a training"):
        call(trainer, taken)


@pytest.mark.parametrize("call", WANT_TRAIN_STATE.values(), ids=WANT_TRAIN_STATE)
def test_a_state_where_a_training_state_is_wanted(trainer, current, call):
    with pytest.raises(ArgumentError, match=r"`current` must be a TrainState, got State; give wh"):
        call(trainer, current.state)
    with pytest.raises(ArgumentError, match=r"`current` is of another trainer: it has no moving"):
        call(trainer, current._replace(average=None))


def test_something_else_where_a_state_is_wanted(trainer):
    with pytest.raises(ArgumentError, match=r"`state` must be a State, got list; give what `pip"):
        trainer.evaluate([], [BATCH])


OTHERS = {
    "stages": ({"K": 3}, "it is for 2 devices along the stage axis, not 3"),
    "replicas": ({"K": 2, "D": 2}, "its arrays are on other devices than this mesh's"),
    "chunks": (
        {"K": 2, "V": 2, "schedule": "interleaved"},
        "it is for 1 chunks on each device, not 2",
    ),
    "frozen": ({"K": 2, "frozen": ["1"]}, "the network, the cut into stages or what is frozen"),
    "cut": ({"K": 2, "partition": [1]}, "the network, the cut into stages or what is frozen"),
}


@pytest.mark.parametrize(("options", "message"), OTHERS.values(), ids=OTHERS)
def test_a_state_of_another_pipeline_says_what_differs(current, options, message):
    other = gpipe.Trainer(make_pipe(**options), optax.adam(1e-2), ema=0.9)
    with pytest.raises(ArgumentError, match=f"another pipeline: {message}.*pipe.from_layers"):
        other.evaluate(current.state, [BATCH])
    with pytest.raises(ArgumentError, match=f"another trainer: {message}.*trainer.from_layers"):
        other.fit(current, [BATCH])


def test_a_state_of_another_optimizer_says_so(trainer, current):
    other = gpipe.Trainer(trainer.pipe, optax.sgd(1e-2), ema=0.9)
    with pytest.raises(ArgumentError, match=r"the optimizer \(`tx`\) differs; .* trainer\.start"):
        other.fit(current, [BATCH])


def test_an_average_is_not_dropped_without_a_word(trainer, current):
    other = gpipe.Trainer(trainer.pipe, optax.adam(1e-2))
    with pytest.raises(ArgumentError, match=r"has a moving average, and this one has no `ema`"):
        other.fit(current, [BATCH])
    assert other.evaluated(current._replace(average=None)) is current.state


def test_a_state_with_a_changed_seed_is_used(trainer, current):
    """Compute gradients within `jax.jit`, whose arrays are traced, from a seed of NumPy."""
    state = current.state._replace(seed=np.uint32(0))
    result = jax.jit(lambda state: trainer.pipe.value_and_grad(state, BATCH).value)(state)
    assert np.isfinite(result.loss)
