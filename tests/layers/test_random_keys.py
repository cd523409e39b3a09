"""Keys: all different, and those of examples independent of how a batch is cut."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpipe_jax.layers import random_keys
from gpipe_jax.utils import choices

STEP = random_keys.step_key(0, 0)
N = 8  # examples of the whole batch

Draw = Callable[[jax.Array, int], jax.Array]  # (key, B) -> [B, ...]
DRAWS: dict[str, Draw] = {
    "bernoulli": lambda key, B: jax.random.bernoulli(key, 0.5, (B, 16)),
    "normal": lambda key, B: jax.random.normal(key, (B, 3, 2)),
    "of a scalar each": lambda key, B: jax.random.uniform(key, (B,)),
    "bits": lambda key, B: jax.random.bits(key, (B, 5), "uint8"),
    "truncated normal": lambda key, B: jax.random.truncated_normal(key, -1, 1, (B, 4)),
    "integers": lambda key, B: jax.random.randint(key, (B, 4), 0, 1000),
    "float64": lambda key, B: jax.random.normal(key, (B, 3), jnp.float64),
    "first of a split": lambda key, B: jax.random.normal(jax.random.split(key)[0], (B, 3)),
    "third of a split": lambda key, B: jax.random.normal(jax.random.split(key, 3)[2], (B, 3)),
    "split in a grid": lambda key, B: jax.random.normal(
        jax.random.split(key, (2, 3))[1, 2], (B, 3)
    ),
    "fold_in": lambda key, B: jax.random.normal(jax.random.fold_in(key, 7), (B, 3)),
    "split of a fold": lambda key, B: jax.random.normal(
        jax.random.split(jax.random.fold_in(key, 7))[1], (B, 3)
    ),
    "nnx streams": lambda key, B: jax.random.normal(nnx.Rngs(key).dropout(), (B, 3)),
    "nnx dropout": lambda key, B: nnx.Dropout(0.5)(jnp.ones((B, 16)), rngs=nnx.Rngs(key)),
}


def of_example(i: int, layer_id: int = 0, step: jax.Array = STEP) -> jax.Array:
    """Return the plain key that example i's randomness comes from."""
    return jax.random.fold_in(jax.random.fold_in(step, layer_id), i)


def rows(draw: Draw, examples: int, layer_id: int = 0, step: jax.Array = STEP) -> np.ndarray:
    """Return what the whole batch draws, in micro-batches of that many examples."""
    parts = [
        draw(random_keys.apply_key(step, layer_id, m, examples), examples)
        for m in range(N // examples)
    ]
    return np.concatenate([np.asarray(part) for part in parts])


@pytest.mark.parametrize("name", DRAWS)
def test_a_row_depends_on_the_examples_place_in_the_whole_batch_only(name: str) -> None:
    """M = 2, B = 4 equals M = 4, B = 2, row by row; and rows differ."""
    with jax.enable_x64(name == "float64"):
        few, many = (rows(DRAWS[name], examples) for examples in (4, 2))
    np.testing.assert_array_equal(few, many)
    assert len(np.unique(few.reshape(N, -1), axis=0)) == N


PER_EXAMPLE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "normal": lambda key: jax.random.normal(key, (3, 2)),
    "third of a split": lambda key: jax.random.normal(jax.random.split(key, 3)[2], (3,)),
    "fold_in": lambda key: jax.random.normal(jax.random.fold_in(key, 7), (3,)),
}


@pytest.mark.parametrize("name", PER_EXAMPLE)
def test_a_row_is_what_the_examples_own_key_draws(name: str) -> None:
    wanted = np.stack([PER_EXAMPLE[name](of_example(i)) for i in range(N)])
    for examples in (1, N):
        np.testing.assert_array_equal(rows(DRAWS[name], examples), wanted)


def test_rows_differ_between_layers_and_steps() -> None:
    draw, places = DRAWS["normal"], list(itertools.product((0, 1), (0, 1, 2)))
    found = [rows(draw, 4, layer, random_keys.step_key(0, step)) for layer, step in places]
    assert len(np.unique(np.concatenate(found).reshape(N * len(places), -1), axis=0)) == N * 6


def test_keys_of_examples_work_in_loops_and_branches() -> None:
    key = random_keys.apply_key(STEP, 0, 1, 4)
    wanted = jax.random.normal(key, (4, 3))

    def body(carry: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = random_keys.apply_key(STEP, 0, m, 4)
        y = jax.lax.cond(m > 0, lambda: jax.random.normal(key, (4, 3)), lambda: jnp.zeros((4, 3)))
        return carry + y, y

    _, ys = jax.jit(lambda: jax.lax.scan(body, jnp.zeros((4, 3)), jnp.arange(2)))()
    np.testing.assert_array_equal(ys[0], 0)
    np.testing.assert_allclose(ys[1], wanted, rtol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (1, 4)])
def test_what_is_not_drawn_for_each_example_is_refused(shape: tuple[int, ...]) -> None:
    message = (
        r"with random keys of single examples the first axis of what is drawn must be the 4 "
        rf"examples of a micro-batch, got shape \[{', '.join(map(str, shape))}\]; draw for each "
        r"example, or use keys of micro-batches"
    )
    with pytest.raises(ValueError, match=message):
        jax.random.normal(random_keys.apply_key(STEP, 0, 0, 4), shape)


def test_both_kinds_of_keys_are_known_by_name() -> None:
    assert choices.KEYS_PER == ("micro_batch", "example")


# ---- keys of micro-batches ----------------------------------------------------------------------


def test_all_keys_differ() -> None:
    """Compare keys of layers, of steps, and of every (step, layer, micro-batch)."""
    all_keys = [random_keys.layer_key(seed, i) for seed in (0, 1) for i in range(3)]
    steps = [random_keys.step_key(seed, s) for seed in (0, 1) for s in range(3)]
    all_keys += steps
    all_keys += [random_keys.apply_key(s, i, m) for s in steps for i in range(3) for m in range(3)]
    data = {tuple(np.asarray(jax.random.key_data(key)).tolist()) for key in all_keys}
    assert len(data) == len(all_keys)


def test_a_micro_batch_has_one_key() -> None:
    key = random_keys.apply_key(STEP, 1, 2)
    wanted = jax.random.fold_in(jax.random.fold_in(STEP, 1), 2)
    assert key.shape == () and key == wanted
