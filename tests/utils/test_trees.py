"""Check strong types of trees, and which leaves have a type at all."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpipe_jax.utils.trees import first_without_type, strong


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (0.5, "float32"),
        (3, "int32"),
        (True, "bool"),
        (np.float64(0.5), "float32"),
        (np.arange(2), "int32"),
        (jnp.where(jnp.arange(2) > 0, 1.0, 0.5), "float32"),
        (jnp.ones(2, jnp.bfloat16), "bfloat16"),
    ],
)
def test_types_are_strong_and_values_the_same(value: Any, dtype: str) -> None:
    array = strong({"a": value})["a"]
    assert (str(array.dtype), array.weak_type) == (dtype, False)
    np.testing.assert_array_equal(array, value)
    beside_half = array * jnp.ones((), jnp.bfloat16)
    assert beside_half.dtype == jnp.promote_types(dtype, jnp.bfloat16)


def test_strong_arrays_and_random_keys_stay_as_they_are() -> None:
    tree = (jnp.ones(2), jax.random.key(0), None)
    assert all(a is b for a, b in zip(strong(tree), tree, strict=True))
    program = jax.make_jaxpr(strong)(jnp.ones(2))
    assert not program.eqns  # nothing is added to a program


@pytest.mark.parametrize("value", ["text", 2**80, print, object()])
def test_leaves_that_are_no_arrays_are_found(value: Any) -> None:
    assert first_without_type({"a": 1.0, "b": [jnp.ones(2), value]}) == ("['b'][1]", value)
    assert first_without_type({"a": 1.0, "b": np.ones(2)}) is None
