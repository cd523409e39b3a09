"""Workarounds for XLA: what they compute, and whether they are still needed.

A test that is marked `xfail` runs without a workaround. If it passes with all supported versions,
delete the workaround.
"""

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gpipe_jax as gpipe
from gpipe_jax.pipeline import executor, stage_step
from gpipe_jax.utils import xla_workarounds
from gpipe_jax.utils.xla_workarounds import (
    backends_are_running,
    computed_once,
    detect_cluster,
    flat_examples,
    read_after,
    recompute_from,
    ring,
    run_branch,
)
from gpipe_jax.zoo.amoebanet.conv_norm import Normalization
from gpipe_jax.zoo.amoebanet.layers import Stem
from gpipe_jax.zoo.basic import ConvHead

TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'gpipe-jax[tpu]' (Linux x86-64)",
)


# ---- recompute_from ------------------------------------------------------------------------------


def test_recompute_from() -> None:
    """XLA merges two equal computations, but not across `recompute_from`."""

    def tanhs(barrier: Callable) -> int:
        def program(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = jnp.tanh(x)
            return y, jnp.tanh(barrier(x)) * 2

        text = jax.jit(program).lower(jnp.ones(8)).compile().as_text() or ""
        return text.count(" tanh(")

    assert tanhs(recompute_from) == 2
    assert tanhs(lambda x: x) == 1


# ---- read_after, run_branch, flat_examples: memory on TPU ---------------------------------------


def test_read_after_changes_nothing() -> None:
    """Replace the value only in a case that never comes, whatever its type."""
    x = {"x": jnp.ones((2, 4)), "ids": jnp.arange(3)}
    params = [jnp.full((4, 4), jnp.inf), jnp.zeros((0, 3)), jnp.ones(3, jnp.bfloat16)]
    read, after = jax.jit(read_after)(params, x, jnp.int32(0))
    jax.tree.map(np.testing.assert_array_equal, (read, after), (params, x))


@pytest.mark.parametrize("count", [1, 3])
def test_run_branch_is_a_switch(count: int) -> None:
    branches = [functools.partial(jnp.add, 10 * n) for n in range(count)]
    for index in range(count):
        ours, plain = (
            jax.jit(lambda i, run=run: run(i, branches, jnp.arange(3)))(index)
            for run in (run_branch, lax.switch)
        )
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5), (3, 0, 2)])
def test_flat_examples_keep_their_order(shape: tuple[int, ...]) -> None:
    a = jnp.arange(np.prod(shape)).reshape(shape)
    assert flat_examples(a).ndim == 2
    np.testing.assert_array_equal(flat_examples(a).reshape(shape), a)


def temporary_bytes(layers: list, example: dict, **options: Any) -> int:
    """Compile the step of two stages for TPU v3; return the bytes of its temporary arrays."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v3:2x2").devices
    pipe = gpipe.Pipeline(
        layers,
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2, devices=devices),
        example=example,
        **options,
    )
    analysis = pipe.lower().compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def transformer_bytes() -> int:
    """Return what a step holds beside its arguments, 51 MiB of parameters."""
    ids = np.zeros((32, 256), np.int32)
    layers = gpipe.zoo.transformer_lm(
        vocabulary=1024, length=256, width=512, heads=4, feed_forward=2048, layers=8,
        dtype="bfloat16",
    )  # fmt: skip
    return temporary_bytes(layers, {"inputs": ids, "labels": ids}, micro_batches=8, remat="layer")


@functools.cache
def with_all_workarounds() -> int:
    return transformer_bytes()


def read_at_once(params: Any, x: Any, index: Any) -> tuple:
    del index
    return params, x


def switch(index: Any, branches: list, operand: Any) -> Any:
    return lax.switch(index, branches, operand) if len(branches) > 1 else branches[0](operand)


@TPU
@pytest.mark.slow
@pytest.mark.xfail(reason="99 instead of 52 MiB with libtpu 0.0.42", strict=False)
def test_without_read_after(monkeypatch: pytest.MonkeyPatch) -> None:
    least = with_all_workarounds()
    monkeypatch.setattr(stage_step, "read_after", read_at_once)
    assert transformer_bytes() <= 1.1 * least


@TPU
@pytest.mark.slow
@pytest.mark.xfail(reason="81 instead of 52 MiB with libtpu 0.0.42", strict=False)
def test_without_run_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    least = with_all_workarounds()
    monkeypatch.setattr(executor, "run_branch", switch)
    assert transformer_bytes() <= 1.1 * least


def images_bytes() -> int:
    """Return what a step holds beside its arguments, 77 MB of images and little else."""
    stem = {"in_features": 3, "features": 32, "stride": 2, "padding": "VALID"}
    layers = [
        gpipe.layer(Stem, norm=Normalization(), dtype="bfloat16", **stem),
        gpipe.layer(ConvHead, in_features=32, classes=10),
    ]
    images, labels = np.zeros((128, 224, 224, 3), np.float32), np.zeros(128, np.int32)
    return temporary_bytes(layers, {"inputs": images, "labels": labels}, micro_batches=32)


@TPU
@pytest.mark.slow
@pytest.mark.xfail(reason="6.1 instead of 0.7 GiB with libtpu 0.0.42", strict=False)
def test_without_flat_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    least = images_bytes()
    monkeypatch.setattr(executor, "flat_examples", lambda a: a)
    assert images_bytes() <= 1.1 * least


# ---- ring ----------------------------------------------------------------------------------------


def test_ring() -> None:
    """Close the ring only where a schedule needs it: openxla/xla issue 45222."""
    assert ring(1, closed=False) == []
    assert ring(3, closed=False) == [(0, 1), (1, 2)]
    assert ring(3, closed=True) == [(0, 1), (1, 2), (2, 0)]


# ---- computed_once -------------------------------------------------------------------------------


def test_computed_once() -> None:
    a = jnp.arange(16).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(jax.jit(computed_once)(a), a)
    text = jax.jit(computed_once).lower(a).compile().as_text() or ""
    assert " while(" in text, "XLA has removed the loop"


# ---- private functions of JAX --------------------------------------------------------------------


def test_private_functions_of_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    """They exist; without them a cluster must be given, and a backend counts as running."""
    jax.devices()
    assert backends_are_running() is True
    for name in ("TPU_WORKER_HOSTNAMES", "SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri"):
        monkeypatch.delenv(name, raising=False)
    assert detect_cluster(1) == (None, None, None)
    for name in ("jax._src.clusters", "jax._src.xla_bridge"):
        monkeypatch.setitem(sys.modules, name, None)
    assert backends_are_running() is True
    with pytest.raises(RuntimeError, match="does not detect clusters"):
        detect_cluster(1)


def test_every_workaround_is_listed() -> None:
    """Name each public function in the table at the top of the module."""
    text = xla_workarounds.__doc__ or ""
    functions = [
        name
        for name, value in vars(xla_workarounds).items()
        if inspect.isfunction(value)
        and value.__module__ == xla_workarounds.__name__
        and not name.startswith("_")
    ]
    assert len(functions) == 9
    for name in functions:
        assert f"\n    {name} " in text
