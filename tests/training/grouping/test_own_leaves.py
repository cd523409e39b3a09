"""Optimizers that see whole parameters, such as LAMB and Muon: exact on the layers' own arrays."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dense import assert_close, is_matrix, make_batch, make_pipe, plainly_trained, trained

import gpipe_jax as gpipe
from gpipe_jax.training.grouping.owned_program import MixedError, OwnedProgram
from gpipe_jax.training.grouping.state_form import GroupedState
from gpipe_jax.utils.trees import PyTree


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def clipped(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(0.5), tx)


def muon() -> optax.GradientTransformation:
    return clipped(optax.contrib.muon(0.02, weight_decay=0.1))


OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "lamb": lambda: clipped(optax.lamb(0.05, weight_decay=0.1, mask=is_matrix)),
    "lars": lambda: optax.lars(0.1, weight_decay=0.1, momentum=0.9),
    "muon": muon,
    "novograd": lambda: optax.novograd(0.05),  # its state has a scalar for each parameter
    "adaptive clipping": lambda: optax.chain(optax.adaptive_grad_clip(0.01), optax.adam(0.05)),
    "block rms": lambda: optax.chain(optax.clip_by_block_rms(0.01), optax.sgd(0.1)),
    "if finite": lambda: optax.apply_if_finite(optax.lars(0.1), 3),
    "noise": lambda: optax.chain(optax.add_noise(0.01, 0.5, 0), optax.sgd(0.1)),
}
LAYOUTS = [(2, 2, 1, "1f1b"), (1, 1, 1, "gpipe"), (4, 1, 1, "1f1b"), (2, 1, 2, "interleaved")]
QUICK = [("lamb", 0)]


@functools.cache
def expected(name: str) -> list:
    return plainly_trained(OPTIMIZERS[name]())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, i, marks=() if (name, i) in QUICK else pytest.mark.slow)
        for name in OPTIMIZERS
        for i in range(len(LAYOUTS))
    ],
)
def test_as_plain_optax_in_any_layout(name: str, layout: int) -> None:
    K, D, V, schedule = LAYOUTS[layout]
    params, current = trained(make_pipe(K, D, V, schedule=schedule), OPTIMIZERS[name]())
    assert isinstance(current.opt_state, GroupedState)
    assert_close(params, expected(name))


@pytest.mark.slow
def test_a_state_moves_to_another_layout(tmp_path: Path) -> None:
    one, other = (gpipe.Trainer(make_pipe(K), OPTIMIZERS["lamb"]()) for K in (1, 2))
    current, _ = one.step(one.init(seed=1), make_batch(0))
    one.save(tmp_path / "saved", current)
    ends = [
        trainer.pipe.to_layers(trainer.step(state, make_batch(1))[0].state)
        for trainer, state in ((one, current), (other, other.load(tmp_path / "saved")))
    ]
    assert_close(*ends)


# --- what stays refused ---------------------------------------------------------------------------


def add_the_first(updates: PyTree, params: PyTree) -> PyTree:
    """Add an element of the first parameter to all; a trial on other arrays does not show it."""
    first = jax.tree.leaves(updates)[0].ravel()[:1]
    return jax.tree.map(lambda a: a + first, updates)


REFUSED: dict[str, Callable[[], optax.GradientTransformation]] = {
    "an element": lambda: optax.stateless(add_the_first),
    "adafactor": lambda: optax.adafactor(1e-3),
    "multi-steps": lambda: optax.MultiSteps(optax.lamb(0.1), 2).gradient_transformation(),
    "one vector": lambda: optax.flatten(optax.lamb(0.1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mixes_parameters_is_refused(name: str) -> None:
    match = r"depends on how parameters are grouped.*use transformations of one parameter each"
    with pytest.raises(ValueError, match=match):
        gpipe.Trainer(make_pipe(2), REFUSED[name]())


# --- the program ----------------------------------------------------------------------------------


def both(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divide by the norm of both, then by the norm of the own result."""
    norm = jnp.sqrt((a**2).sum() + (b**2).sum())
    return tuple(x / jnp.linalg.norm(x / norm) for x in (a, b))  # type: ignore[return-value]


def test_scalars_are_exchanged_level_by_level() -> None:
    a, b = jnp.arange(1.0, 4.0), jnp.arange(2.0, 7.0)
    program = OwnedProgram(jax.make_jaxpr(both)(a, b), [0, 1])
    assert program.levels == 2 and program.owners == [0, 1]
    known: dict[int, Any] = {}
    for level in range(2):
        of_devices = [
            program.scalars(level, {i}, known, x) for i, x in enumerate([(a, None), (None, b)])
        ]
        assert of_devices[0].keys() == of_devices[1].keys()
        known |= {n: sum(found[n] for found in of_devices) for n in of_devices[0]}
    first, other = program.outputs({0}, known, (a, None))
    np.testing.assert_allclose(first, both(a, b)[0], rtol=1e-12)
    assert other is None


def test_arrays_are_not_exchanged() -> None:
    with pytest.raises(MixedError, match="`add` takes elements of several parameters"):
        OwnedProgram(jax.make_jaxpr(jnp.add)(jnp.ones(3), jnp.ones(3)), [0, 1])
