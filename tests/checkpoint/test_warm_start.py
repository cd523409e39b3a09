"""Check warm starts: what matches is taken bit for bit, in any layout; the report and errors."""

import functools
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax.checkpoint import export
from gpipe_jax.errors import ArgumentError, DataError

BATCH = {
    "inputs": np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32),
    "labels": np.arange(8, dtype=np.int32) % 2,
}


class Block(nnx.Module):
    def __init__(self, width: int, out: int, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(width, out, rngs=rngs)
        self.norm = nnx.BatchNorm(out, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.norm(self.linear(x)))


@functools.cache  # building and initializing compiles
def same_pipe() -> gpipe.Pipeline:
    """Return a pipeline of the trained network."""
    return make_pipe(4, 6, 6, 2)


def make_pipe(*widths: int, stages: int = 2, data: int = 1, **options: Any) -> gpipe.Pipeline:
    return gpipe.Pipeline(
        [gpipe.layer(Block, width=a, out=b) for a, b in itertools.pairwise(widths)],
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=stages, data=data),
        example=BATCH,
        **{"micro_batches": 2, **options},
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list, list, Any]:
    """Return a folder, averages and statistics after four steps, and the parameters."""
    pipe = same_pipe()
    trainer = gpipe.Trainer(pipe, optax.adam(0.1), ema=0.5)
    current = trainer.fit(trainer.init(1), [BATCH] * 4)
    folder = tmp_path_factory.mktemp("trained")
    trainer.save(folder, current)
    state = trainer.evaluated(current)
    return folder, pipe.to_layers(state), pipe.statistics(state), pipe.to_layers(current.state)


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    "layout",
    [
        {"stages": 3},
        {"stages": 1, "data": 2},
        {"stages": 1, "chunks": 3, "frozen": ["0", "*.bias"]},
    ],
    ids=["three stages", "two replicas", "chunks, frozen"],
)
def test_everything_is_taken_into_any_layout(trained, layout):
    """Take averages and statistics, also of frozen parameters."""
    folder, averages, statistics, params = trained
    schedule = {"schedule": "interleaved"} if "chunks" in layout else {}
    pipe = make_pipe(4, 6, 6, 2, **layout, **schedule)
    warm = gpipe.warm_start(pipe, folder, seed=7, strict=True)
    assert_equal(pipe.to_layers(warm.state), averages)
    assert_equal(pipe.statistics(warm.state), statistics)
    assert not np.array_equal(averages[0]["linear"]["kernel"], params[0]["linear"]["kernel"])
    assert np.any(statistics[0]["norm"]["mean"]) and int(warm.state.seed) == 7
    assert len(warm.matched) == 18 and str(warm) == "18 of 18 arrays taken"


def test_what_does_not_match_is_reported_and_starts_fresh(trained):
    folder, averages, statistics, _ = trained
    pipe = make_pipe(4, 6, 6, 3)
    warm = gpipe.warm_start(pipe, folder)
    fresh = pipe.init(0)
    assert_equal(pipe.to_layers(warm.state)[:2], averages[:2])
    assert_equal(pipe.to_layers(warm.state)[2], pipe.to_layers(fresh)[2])
    assert_equal(pipe.statistics(warm.state)[:2], statistics[:2])
    assert warm.different["2.linear.kernel"] == ((6, 2), (6, 3))
    assert len(warm.matched) == 12 and len(warm.different) == 6 and not warm.missing + warm.unused
    assert str(warm).startswith(
        "12 of 18 arrays taken\n"
        "other shapes, so initial values: 2.linear.bias (2,) there, (3,) here"
    )


def test_layers_that_have_moved_are_renamed(trained):
    """Put a new layer in front of the others: each name is renamed once."""
    _, averages, _, _ = trained
    pipe = make_pipe(4, 4, 6, 6, 2)
    warm = gpipe.warm_start(pipe, averages, rename={"0": "1", "1": "2", "2": "3"})
    assert_equal(pipe.to_layers(warm.state)[1:], averages)
    assert warm.missing == (
        *(f"0.{name}" for name in ("linear.bias", "linear.kernel", "norm.bias", "norm.scale")),
        *(f"{i}.norm.{name}" for i in range(4) for name in ("mean", "var")),
    )


def test_the_longest_beginning_counts(trained):
    warm = gpipe.warm_start(same_pipe(), trained[1], rename={"0": "9", "0.linear": "0.linear"})
    assert "0.linear.kernel" in warm.matched
    assert warm.unused == ("9.norm.bias", "9.norm.scale")


def test_a_module_and_a_dict_by_name_are_sources(trained):
    pipe = same_pipe()
    module = Block(4, 6, rngs=nnx.Rngs(3))
    warm = gpipe.warm_start(pipe, module, rename={"linear": "0.linear", "norm": "0.norm"})
    assert len(warm.matched) == 6
    kernel = pipe.to_layers(warm.state)[0]["linear"]["kernel"]
    np.testing.assert_array_equal(kernel, module.linear.kernel[...])
    wide = {"layers.1.linear.kernel": trained[1][1]["linear"]["kernel"].astype(np.float64)}
    warm = gpipe.warm_start(pipe, wide)
    assert warm.matched == ("1.linear.kernel",)
    assert_equal(
        pipe.to_layers(warm.state)[1]["linear"]["kernel"], trained[1][1]["linear"]["kernel"]
    )


@pytest.mark.parametrize("suffix", export.SUFFIXES)
def test_an_exported_file_is_a_source(trained, tmp_path, suffix):
    path = tmp_path / f"trained{suffix}"
    export.export(trained[0], path)
    warm = gpipe.warm_start(same_pipe(), path, strict=True)
    assert_equal(same_pipe().to_layers(warm.state), trained[1])
    assert_equal(same_pipe().statistics(warm.state), trained[2])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        ArgumentError, match=rf"`source` .*trained{suffix} cannot be read: .* again"
    ):
        gpipe.warm_start(same_pipe(), path)


def test_a_warm_start_trains(trained):
    pipe = same_pipe()
    trainer = gpipe.Trainer(pipe, optax.adam(0.1))
    current = trainer.start(gpipe.warm_start(pipe, trained[0]).state)
    plain = trainer.start(pipe.from_layers(trained[1], statistics=trained[2]))
    losses = [
        trainer.step(state, BATCH)[1]["loss"] for state in (current, plain, trainer.init(seed=0))
    ]
    assert losses[0] == losses[1] != losses[2]


WRONG: dict[str, tuple[Any, dict, str]] = {
    "a number": (3, {}, r"`source` must be the path .*, got int"),
    "nothing matches": ({"x": np.zeros(3)}, {}, r"nothing of `source` matches .* unused: x; give"),
    "a typing error": (None, {"rename": {"0.liner": "1"}}, r"`rename` has '0.liner', .*'0.linear'"),
    "one name": (None, {"rename": {"0": "1"}}, r"gives 0.linear.bias and 1.linear.bias the same"),
    "a rename": (None, {"rename": {"0": 1}}, "`rename` must be a dict from old .*'5'}, got 1"),
    "a seed": (None, {"seed": -1}, "`seed` must be a whole number from 0 to 4294967295, got -1"),
    "dots": (
        {"a.b": np.zeros(1), "a": {"b": np.zeros(1)}},
        {},
        "`source` .* named 'a.b'; use keys",
    ),
    "strict": (None, {"strict": True}, r"with `strict`, all arrays .* values: 0.norm.mean, 0.norm"),
    "no folder": ("no/such", {}, r"`source` no/such does not exist; give the folder of a run"),
}


@pytest.mark.parametrize(("source", "arguments", "message"), WRONG.values(), ids=WRONG)
def test_errors_name_the_rule(trained, source, arguments, message):
    source = trained[1] if source is None else source
    with pytest.raises(ArgumentError, match=message):
        gpipe.warm_start(same_pipe(), source, **arguments)


def test_states_and_numbers_that_do_not_fit_are_refused(trained):
    pipe = same_pipe()
    with pytest.raises(ArgumentError, match=r"got State; of a state, give pipe.to_layers\(state\)"):
        gpipe.warm_start(pipe, pipe.init(0))
    with pytest.raises(
        ArgumentError, match=r"`pipe` must be a Pipeline, got Trainer; .*trainer.pipe"
    ):
        gpipe.warm_start(gpipe.Trainer(pipe, optax.sgd(0.1)), trained[1])
    with pytest.raises(DataError, match=r"0.linear.bias of the source"):
        gpipe.warm_start(pipe, {"0.linear.bias": np.full(6, 1e300)})


def test_a_damaged_checkpoint_is_an_error(trained, tmp_path):
    pipe = same_pipe()
    trainer = gpipe.Trainer(pipe, optax.sgd(0.1))
    trainer.save(tmp_path, trainer.init(0))
    (tmp_path / "checkpoints/0/state/1.safetensors").unlink()
    with pytest.raises(ArgumentError, match=r"step 0 cannot be used: 1.safetensors is missing"):
        gpipe.warm_start(pipe, tmp_path)
