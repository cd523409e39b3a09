"""Run one stage on one micro-batch: check its gradients, and how often it computes what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpipe_jax.layers.shape_inference import infer_shapes
from gpipe_jax.layers.skips_and_ties import Boundary
from gpipe_jax.layers.sources.describe import layer
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.pipeline.remat import MAX_UNROLL, POLICIES, Remat
from gpipe_jax.pipeline.stage_step import PASSES, Call, StageStep
from gpipe_jax.utils import choices

WIDTH = 4
RNG = np.random.default_rng(0)


def affine(params: dict, x: dict) -> dict:
    """Tanh of a product; integers pass it by."""
    jax.debug.callback(lambda _: CALLS.append(1), x["x"][0, 0])
    return {"x": jnp.tanh(x["x"] @ params["w"]), "ids": x["ids"]}


CALLS: list[int] = []
LAYER = layer(lambda key, x: {"w": jnp.zeros((WIDTH, WIDTH))}, affine)


@pytest.mark.parametrize("count", [1, 3, MAX_UNROLL + 1])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_gradients_are_added_to_the_sums_and_layers_computed_as_often_as_said(
    count: int, policy: Remat
) -> None:
    x = {"x": jnp.asarray(RNG.normal(size=(2, WIDTH))), "ids": jnp.arange(3)}
    shapes = infer_shapes([LAYER] * count, x)
    stages = Stages(shapes, [range(count)], remat=policy)
    (storage,) = stages.params
    params = [{"w": RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)} for _ in range(count)]
    before = [{"w": RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)} for _ in range(count)]
    g = jnp.asarray(RNG.normal(size=(2, WIDTH)))

    def last(params: list, x_float: jax.Array) -> jax.Array:
        y = x_float
        for p in params:
            y = jnp.tanh(y @ p["w"])
        return y

    _, pull = jax.vjp(last, params, x["x"])
    wanted, wanted_x = pull(g)

    @jax.jit
    def backward(local: dict, sums: dict) -> tuple:
        call = Call(jax.random.key(0), jnp.int32(0), None, train=True, progress=1.0, extras={})
        ids = jnp.asarray(stages.geometry.layer_ids()[0, 0])
        nothing = {"slots": [], "packs": []}
        stage = StageStep(stages, 0, local, nothing, nothing, {}, ids, call)
        return stage.backward(Boundary(x, {}), lambda y: ([g], y.x["ids"]), sums, {}, {})

    arrays = storage.join_layers(0, params)
    CALLS.clear()
    back, _, ids = jax.device_get(backward(arrays, storage.join_layers(0, before)))
    jax.effects_barrier()
    assert len(CALLS) == count * policy.forwards
    np.testing.assert_array_equal(ids, x["ids"])
    np.testing.assert_allclose(back.x[0], wanted_x, rtol=1e-5, atol=1e-6)
    sums = storage.split_layers(0, back.params)
    for had, more, now in zip(before, wanted, sums, strict=True):
        np.testing.assert_allclose(now["w"], had["w"] + more["w"], rtol=1e-4, atol=1e-5)


def test_every_policy_has_a_name_for_the_configuration_and_its_passes() -> None:
    assert tuple(POLICIES) == choices.REMAT
    assert set(PASSES) == set(POLICIES)
    assert all(POLICIES[name].name == name for name in POLICIES)
