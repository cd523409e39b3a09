"""Check the optimizers that a config names, on pipelines: as plain optax on the layers' own trees.

Frozen parameters do not decay, and have no place in the global norm.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax
import pytest
from dense import assert_close, is_matrix, make_pipe, plainly_trained, trained

import gpipe_jax as gpipe
from gpipe_jax.config import loader
from gpipe_jax.errors import ConfigError
from gpipe_jax.training.grouping.transformation import GroupedState

RATE, DECAY, L2, CLIP = 2**-6, 0.125, 0.0625, 0.25  # exact in float32, as optax keeps rates


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def rmsprop() -> optax.GradientTransformation:
    rms = optax.scale_by_rms(0.9, 0.1, 1.0, eps_in_sqrt=True)
    return optax.chain(rms, optax.scale_by_learning_rate(RATE), optax.trace(0.9))


KINDS: dict[str, tuple[str, Callable[[], optax.GradientTransformation]]] = {
    "adamw": ("kind: adamw", lambda: optax.adam(RATE)),
    "sgd": ("kind: sgd, nesterov: true", lambda: optax.sgd(RATE, 0.9, nesterov=True)),
    "rmsprop": ("kind: rmsprop", rmsprop),
    "lion": ("kind: lion", lambda: optax.lion(RATE, weight_decay=0.0)),
    "muon": ("kind: muon, ns_steps: 3", lambda: optax.contrib.muon(RATE, ns_steps=3)),
    "lamb": ("kind: python, function: 'optax:lamb'", lambda: optax.lamb(RATE)),
    "python": (
        "kind: python, function: 'optax:adabelief', arguments: {b2: 0.75}",
        lambda: optax.adabelief(RATE, b2=0.75),
    ),
}


WHOLE = ("muon", "lamb")  # kinds that see whole parameters


def reference(descent: optax.GradientTransformation) -> optax.GradientTransformation:
    """Return the optimizer with its decays and clipping, from optax alone."""
    return optax.chain(
        optax.add_decayed_weights(L2, is_matrix),
        optax.clip_by_global_norm(CLIP),
        descent,
        _decay(),
    )


def _decay() -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple:
        decayed = jax.tree.map(
            lambda u, p: u - RATE * DECAY * p if p.ndim > 1 else u, updates, params
        )
        return decayed, state

    return optax.GradientTransformation(lambda params: (), update)


FEW = [("lion", 2, False), ("adamw", 2, True)]


@pytest.mark.parametrize(
    ("kind", "K", "frozen"),
    [
        pytest.param(*case, marks=() if case in FEW else pytest.mark.slow)
        for kind in KINDS
        for case in ((kind, 1, False), (kind, 2, False), (kind, 4, False), (kind, 2, True))
    ],
)
def test_as_plain_optax(kind: str, K: int, frozen: bool) -> None:
    settings, descent = KINDS[kind]
    shared = f"learning_rate: {RATE}, weight_decay: {DECAY}, l2: {L2}, clip_norm: {CLIP}"
    config = loader.load(
        {"model": {"kind": "mlp"}, "data": {"kind": "digits"}},
        [f"optimizer={{{settings}, schedule: constant, {shared}}}"],
    )
    layers = (2, 3) if frozen else ()
    pipe = make_pipe(K, frozen=[str(i) for i in layers] or None)
    params, current = trained(pipe, gpipe.optimizers.build(config.optimizer, 10))
    assert isinstance(current.opt_state, GroupedState) == (kind in WHOLE)
    assert_close(params, plainly_trained(reference(descent()), layers))


@pytest.mark.parametrize(
    ("kind", "substitute"),
    [("adafactor", "use lion"), ("lars", "function: optax:lars"), ("lamb", "function: optax:lamb")],
)
def test_what_is_no_kind_names_its_substitute(kind: str, substitute: str) -> None:
    with pytest.raises(ConfigError, match=f"optimizer.kind: {kind} .*; .*{substitute}"):
        loader.load(
            {"model": {"kind": "mlp"}, "data": {"kind": "digits"}}, [f"optimizer.kind={kind}"]
        )
