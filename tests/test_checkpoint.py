"""Saved states come back exactly, or an error says what does not fit."""

import jax
import numpy as np
import pytest

from gpipe_jax import checkpoint


@pytest.fixture
def tree() -> dict:
    rng = np.random.default_rng(0)
    return {
        "params": [{"linear": {"kernel": rng.normal(size=(3, 2)), "bias": np.arange(2.0)}}, {}],
        "optimizer": (np.int32(7), [rng.normal(size=2).astype(np.float32)]),
        "seed": np.asarray(3, np.uint32),
    }


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), tree)


def test_roundtrip_is_exact(tmp_path, tree):
    checkpoint.save(tmp_path / "with a space", 5, tree)
    found = checkpoint.restore(tmp_path / "with a space", 5, shapes(tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert jax.tree.map(lambda a: a.dtype, found) == jax.tree.map(lambda a: a.dtype, tree)


@pytest.fixture
def averaged(tree) -> dict:
    """With running statistics, a moving average, and None in place of a borrowed parameter."""
    params = [*tree["params"], {"linear": {"kernel": None, "bias": np.arange(3.0)}}]
    norm = {"mean": np.linspace(0, 1, 3, dtype=np.float32), "var": np.full(3, 1 / 3, np.float32)}
    average = jax.tree.map(lambda a: (a / 3).astype(np.float32), params)
    stats = [{"norm": norm, "rest": {0: norm}}, {}, {}]
    return {**tree, "params": params, "statistics": stats, "average": average}


def test_averages_and_statistics_come_back_exactly(tmp_path, averaged):
    checkpoint.save(tmp_path, 5, averaged)
    found = checkpoint.restore(tmp_path, 5, shapes(averaged))
    assert jax.tree.structure(found) == jax.tree.structure(averaged)
    jax.tree.map(np.testing.assert_array_equal, found, averaged)
    assert found["params"][2]["linear"]["kernel"] is None


def test_an_average_is_neither_dropped_nor_made_up(tmp_path, averaged):
    without = {**averaged, "average": None}
    checkpoint.save(tmp_path / "with", 1, averaged)
    with pytest.raises(
        ValueError, match=r"unknown average.0.linear.bias; unknown average.0.linear"
    ):
        checkpoint.restore(tmp_path / "with", 1, shapes(without))
    checkpoint.save(tmp_path / "without", 1, without)
    with pytest.raises(
        ValueError, match=r"missing average.0.linear.bias; missing average.0.linear"
    ):
        checkpoint.restore(tmp_path / "without", 1, shapes(averaged))


def test_the_newest_of_several(tmp_path, tree):
    for step in (2, 10, 20):
        checkpoint.save(tmp_path, step, {**tree, "seed": np.uint32(step)})
    assert checkpoint.latest_step(tmp_path) == 20
    assert int(checkpoint.restore(tmp_path, 10, tree)["seed"]) == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "20"]


def test_no_checkpoint_yet(tmp_path):
    assert checkpoint.latest_step(tmp_path / "nothing") is None
    assert not (tmp_path / "nothing").exists()
    assert checkpoint.latest_step(tmp_path) is None


def test_everything_that_does_not_fit_is_listed(tmp_path, tree):
    checkpoint.save(tmp_path, 1, tree)
    linear = {"kernel": np.zeros((3, 4)), "gain": np.zeros(2)}
    other = {**tree, "params": [{"linear": linear}, {}]}
    wanted = (
        r"checkpoint .*1 does not fit this run: missing params.0.linear.gain; "
        r"params.0.linear.kernel has shape \[3, 2\], wanted \[3, 4\]; "
        r"unknown params.0.linear.bias"
    )
    with pytest.raises(ValueError, match=wanted):
        checkpoint.restore(tmp_path, 1, shapes(other))
