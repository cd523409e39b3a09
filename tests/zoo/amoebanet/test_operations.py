"""Compare every operation with its definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from operations_in_numpy import DEFINITIONS, FEATURES, NORM, apply, match_of, randomized

from gpipe_jax.genotypes import genotype
from gpipe_jax.zoo.amoebanet import conv_norm
from gpipe_jax.zoo.amoebanet.conv_norm import (
    ConvNorm,
    FactorizedReduction,
    Normalization,
    SeparableNorm,
)
from gpipe_jax.zoo.amoebanet.operations import OPERATIONS


def test_there_is_every_operation_of_a_genotype() -> None:
    assert tuple(OPERATIONS) == genotype.OPERATIONS == tuple(DEFINITIONS)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("stride", "in_features"), [(1, FEATURES), (2, FEATURES), (1, 3)])
def test_an_operation_computes_its_definition(name: str, stride: int, in_features: int) -> None:
    with jax.enable_x64(True):
        op = OPERATIONS[name](in_features, FEATURES, stride, norm=NORM, rngs=nnx.Rngs(0))
        params = randomized(op)
        x = np.random.default_rng(1).normal(size=(2, 7, 6, in_features))
        y = apply(op, x)
    wanted = DEFINITIONS[name](x, params, stride)
    assert y.dtype == np.float64 and y.shape == (2, -(-7 // stride), 6 // stride, FEATURES)
    np.testing.assert_allclose(y, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size", [(7, 6), (4, 5)])
def test_a_factorized_reduction_reads_even_and_odd_pixels(size: tuple, relu: bool) -> None:
    with jax.enable_x64(True):
        reduction = FactorizedReduction(3, 5, relu=relu, norm=NORM, rngs=nnx.Rngs(0))
        params = randomized(reduction)
        x = np.random.default_rng(1).normal(size=(2, *size, 3))
        y = apply(reduction, x)
    assert y.shape == (2, -(-size[0] // 2), -(-size[1] // 2), 5)
    np.testing.assert_allclose(y, match_of(x, params, relu), rtol=1e-9, atol=1e-9)


def test_kernels_start_with_the_variance_of_their_fan_out() -> None:
    made = {"norm": NORM, "rngs": nnx.Rngs(0)}
    conv_part = ConvNorm(16, 64, size=(3, 5), **made)
    separable_part = SeparableNorm(512, 64, size=3, **made)
    for kernel, fan_out in [
        (conv_part.kernel, 3 * 5 * 64),
        (separable_part.depthwise, 3 * 3),
        (separable_part.pointwise, 64),
    ]:
        values = np.asarray(kernel[...])
        assert abs(values.mean()) < 0.1 * values.std()
        np.testing.assert_allclose(values.std(), np.sqrt(2 / fan_out), rtol=0.05)


def test_an_operation_computes_in_the_type_of_its_input() -> None:
    part = ConvNorm(3, 4, size=(3, 3), norm=NORM, rngs=nnx.Rngs(0))
    assert part.kernel[...].dtype == jnp.float32
    assert apply(part, jnp.ones((2, 5, 5, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def test_batch_norm_has_the_momentum_and_epsilon_it_is_told() -> None:
    norm = Normalization(momentum=0.25).make(4, nnx.Rngs(0))
    assert (norm.momentum, norm.epsilon, norm.axis_name) == (0.25, conv_norm.EPSILON, None)


def test_batch_norm_over_replicas_is_that_of_their_joint_batch() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 2)).astype("float32")
    joint, alone = (
        ConvNorm(2, 4, norm=Normalization(axis_name=name), rngs=nnx.Rngs(0))
        for name in ("data", None)
    )
    graph, state = nnx.split(joint)
    each = jax.vmap(
        lambda state, x: nnx.merge(graph, state)(x), in_axes=(None, 0), axis_name="data"
    )(state, x)
    whole = apply(alone, x.reshape(6, 4, 4, 2))
    np.testing.assert_allclose(each.reshape(whole.shape), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(each[0] - apply(alone, x[0])).max() > 0.01
