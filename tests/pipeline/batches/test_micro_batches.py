"""Check how batches become micro-batches: types, lists of numbers, examples of weight zero."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gpipe_jax as gpipe
from gpipe_jax import sequential
from gpipe_jax.errors import DataError
from gpipe_jax.layers.random_keys import step_key
from gpipe_jax.utils.trees import PyTree

EXAMPLES, WIDTH, CLASSES = 8, 6, 5
WEIGHTS = np.array([0, 1, 0, 2, 0, 1, 1, 0.0])
WEIGHTLESS = WEIGHTS == 0


def weights_of(rows: int, columns: int):
    def init(key: jax.Array, x: PyTree) -> dict:
        return {"w": jax.random.normal(key, (rows, columns)) / rows**0.5}

    return init


def dense(params: dict, x: jax.Array) -> jax.Array:
    return jnp.tanh(x.astype(jnp.float32) @ params["w"])


LAYERS = [
    gpipe.layer(weights_of(WIDTH, WIDTH), dense),
    gpipe.layer(weights_of(WIDTH, CLASSES), dense),
]
NORMED = [
    gpipe.layer(nnx.Linear, in_features=WIDTH, out_features=WIDTH),
    gpipe.layer(nnx.BatchNorm, num_features=WIDTH),
    gpipe.layer(weights_of(WIDTH, CLASSES), dense),
]


def make_batch(**changes) -> dict:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(EXAMPLES, WIDTH)).astype(np.float32)
    batch = {"inputs": inputs, "labels": rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)}
    return {**batch, **changes}


def build(layers=LAYERS, loss=gpipe.losses.softmax_cross_entropy, **changes) -> gpipe.Pipeline:
    mesh = gpipe.make_mesh(stages=2)
    options = {"example": make_batch(), "micro_batches": 2, **changes}
    return gpipe.Pipeline(layers, loss=loss, mesh=mesh, **options)


@pytest.fixture(scope="module")
def pipe() -> gpipe.Pipeline:
    return build()


# --- types ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"labels": np.arange(8) + 2**32},
            r"batch\['labels'\] of int64 holds 4294967296, but .*int32",
        ),
        (
            {"inputs": np.full((8, 6), 1e39)},
            r"batch\['inputs'\] of float64 holds 1e\+39, .* float32",
        ),
        (
            {"inputs": np.ma.masked_less(make_batch()["inputs"], 0)},
            r"\['inputs'\] is a masked array",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(pipe, changes, said):
    with pytest.raises(DataError, match=said):
        pipe.split(make_batch(**changes))


def test_apply_refuses_them_too(pipe):
    with pytest.raises(DataError, match=r"batch\['inputs'\] of float64 holds 1e\+39"):
        pipe.predict(pipe.init(0), np.full((3, 6), 1e39))


def test_labels_are_compared_with_what_jax_makes_of_the_example():
    """Check an example in int64, which JAX makes int32."""
    labels = make_batch()["labels"].astype(np.int64)
    pipe = build(example=make_batch(labels=labels))
    pipe.split(make_batch(labels=labels))
    with pytest.raises(
        DataError, match=r"labels'\] of int64 holds 1099511627776, but .* int32, .*x64"
    ):
        pipe.split(make_batch(labels=labels + 2**40))
    with jax.enable_x64(True):
        wide = build(example=make_batch(labels=labels))
        assert wide.split(make_batch(labels=labels + 2**40))["labels"].max() > 2**40


def test_other_byte_orders(pipe):
    batch = make_batch()
    swapped = {name: a.astype(a.dtype.newbyteorder(">")) for name, a in batch.items()}
    assert not swapped["inputs"].dtype.isnative
    for example in (batch, swapped):
        have = build(example=example).split(swapped)
        jax.tree.map(np.testing.assert_array_equal, have, pipe.split(batch))


def test_an_array_is_copied(pipe):
    """Check that a caller may fill the same buffer again while a step runs."""
    batch = make_batch()
    have = pipe.split(batch)
    before = jax.tree.map(np.array, have)
    batch["inputs"][:], batch["labels"][:] = 9, 0
    jax.tree.map(np.testing.assert_array_equal, have, before)


# --- lists ---------------------------------------------------------------------------------------


def as_lists(batch: dict) -> dict:
    return {name: a.tolist() for name, a in batch.items()}


def test_nested_lists_of_numbers_are_arrays(pipe):
    lists = as_lists(make_batch(weights=WEIGHTS))
    wanted = pipe.split(make_batch(weights=WEIGHTS))
    for of_lists in (pipe, build(example=as_lists(make_batch()))):
        jax.tree.map(np.testing.assert_array_equal, of_lists.split(lists), wanted)
    state, inputs = pipe.init(0), make_batch()["inputs"]
    have = pipe.predict(state, tuple(map(tuple, inputs.tolist())))
    np.testing.assert_array_equal(have, pipe.predict(state, inputs))
    np.testing.assert_array_equal(
        pipe.evaluate(state, as_lists(make_batch())).loss, pipe.evaluate(state, make_batch()).loss
    )


def test_batches_may_be_a_list(pipe):
    trainer = gpipe.Trainer(pipe, optax.sgd(0.1))
    records: list = []
    current = trainer.fit(trainer.init(0), [make_batch()] * 3, 3, records.append)
    assert current.step == 3 and [record["step"] for record in records] == [1, 2, 3]
    state = trainer.evaluated(current)
    assert trainer.evaluate(state, (make_batch(),)) == trainer.evaluate(state, iter([make_batch()]))
    with pytest.raises(DataError, match=r"`batches` ended after 4 of 5 steps"):
        trainer.fit(current, [make_batch()], 5, records.append)


def test_a_list_of_arrays_stays_a_tree():
    layers = [gpipe.layer(lambda key, x: {}, lambda params, x: x[0] + x[1]), *LAYERS]
    x = make_batch()["inputs"]
    pipe = build(layers, example=make_batch(inputs=[x, x]))
    assert [a.shape for a in pipe.split(make_batch(inputs=[x, x]))["inputs"]] == [(2, 4, 6)] * 2
    with pytest.raises(DataError, match=r"batch\['inputs'\] has structure"):
        pipe.split(make_batch())


def test_any_mapping_is_a_batch(pipe):
    have = pipe.split(MappingProxyType(make_batch()))
    jax.tree.map(np.testing.assert_array_equal, have, pipe.split(make_batch()))


@pytest.mark.parametrize("batch", [(1, 2), [1, 2], None, np.zeros(3)])
def test_what_is_no_dict_is_refused(pipe, batch):
    trainer = gpipe.Trainer(pipe, optax.sgd(0.1))
    said = f"a batch is a dict with the keys .*; got a {type(batch).__name__}; of a pair"
    with pytest.raises(DataError, match=said):
        trainer.step(trainer.init(0), batch)
    with pytest.raises(DataError, match=said):
        trainer.evaluate(pipe.init(0), iter([batch]))
    with pytest.raises(DataError, match=said):
        build(example=batch)


# --- examples of weight zero ---------------------------------------------------------------------


def spoil(batch: dict, value: float) -> dict:
    inputs = batch["inputs"].copy()
    inputs[WEIGHTLESS] = value
    return {**batch, "inputs": inputs, "weights": WEIGHTS}


def only_counted(batch: dict) -> dict:
    return {"weights": WEIGHTS, **{name: a[~WEIGHTLESS] for name, a in batch.items()}} | {
        "weights": WEIGHTS[~WEIGHTLESS]
    }


def root_loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Return a loss whose slope is infinite for label 4."""
    return jnp.sqrt(jnp.where(labels == 4, 0.0, (outputs**2).sum(-1)))


def assert_same(have: PyTree, wanted: PyTree) -> None:
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(wanted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), have, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_inputs_of_weight_zero_do_not_reach_the_gradients(pipe, value):
    state, batch = pipe.init(0), make_batch()
    value_of, gradients, _ = pipe.value_and_grad(state, spoil(batch, value))
    wanted_value, wanted, _ = pipe.value_and_grad(state, only_counted(batch))
    assert_same((value_of, pipe.to_layers(gradients)), (wanted_value, pipe.to_layers(wanted)))


def test_an_infinite_slope_of_weight_zero_does_not_reach_the_gradients():
    pipe = build(loss=root_loss)
    labels = np.where(WEIGHTLESS, 4, 0).astype(np.int32)
    state, batch = pipe.init(0), make_batch(labels=labels)
    _, gradients, _ = pipe.value_and_grad(state, {**batch, "weights": WEIGHTS})
    _, wanted, _ = pipe.value_and_grad(state, only_counted(batch))
    assert_same(pipe.to_layers(gradients), pipe.to_layers(wanted))


def test_a_weight_that_becomes_zero_counts_as_one(pipe):
    """Check a weight so small, beside the others, that float32 cannot hold it."""
    tiny = np.where(WEIGHTLESS, 1e-60, WEIGHTS)
    batch = {**spoil(make_batch(), np.nan), "weights": tiny}
    gradients = pipe.to_layers(pipe.value_and_grad(pipe.init(0), batch).gradients)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(gradients))


def test_padding_copies_an_example_that_counts(pipe):
    batch = {name: a[:6] for name, a in spoil(make_batch(), np.nan).items()}
    assert WEIGHTS[0] == 0
    have = pipe.split(batch)
    np.testing.assert_array_equal(have["inputs"].reshape(8, 6)[6:], batch["inputs"][[1, 1]])
    assert np.isfinite(have["inputs"]).all()


def test_the_sequential_program_does_the_same(pipe):
    state, batch = pipe.init(0), spoil(make_batch(), np.nan)
    step = sequential.value_and_grad(LAYERS, gpipe.losses.softmax_cross_entropy, 2)
    params = pipe.to_layers(state)
    value, gradients, _ = step(params, [{}, {}], batch, step_key(0, 0))
    have_value, have, _ = pipe.value_and_grad(state, batch)
    assert_same((tuple(have_value), pipe.to_layers(have)), (value, gradients))


def test_batch_norm_counts_examples_of_weight_zero():
    """Check their inputs in training: they are kept, by the sequential program too."""
    pipe, batch = build(NORMED), spoil(make_batch(), 3.0)
    state = pipe.init(0)
    step = sequential.value_and_grad(NORMED, gpipe.losses.softmax_cross_entropy, 2)
    start = pipe.to_layers(state), pipe.statistics(state)
    value, gradients, stats = step(*start, batch, step_key(0, 0))
    have = pipe.value_and_grad(state, batch)
    assert_same((tuple(have.value), pipe.to_layers(have.gradients)), (value, gradients))
    assert_same(pipe.statistics(have.state), stats)
    other = pipe.value_and_grad(state, spoil(make_batch(), 4.0))
    assert float(abs(other.value.loss - have.value.loss)) > 1e-4


def test_a_short_batch_with_batch_norm_counts_its_inputs_again():
    """Check the padding: the inputs of the batch in their order, at weight 0."""
    pipe, state = build(NORMED), build(NORMED).init(0)
    short = {name: a[:5] for name, a in make_batch().items()}
    full = {name: a[np.arange(8) % 5] for name, a in short.items()}
    full["weights"] = (np.arange(8) < 5).astype(float)
    step = sequential.value_and_grad(NORMED, gpipe.losses.softmax_cross_entropy, 2)
    start = pipe.to_layers(state), pipe.statistics(state)
    value, gradients, stats = step(*start, full, step_key(0, 0))
    have = pipe.value_and_grad(state, short)
    assert_same((tuple(have.value), pipe.to_layers(have.gradients)), (value, gradients))
    assert_same(pipe.statistics(have.state), stats)


def test_batch_norm_refuses_numbers_that_are_not_finite():
    pipe, batch = build(NORMED), spoil(make_batch(), np.nan)
    said = (
        r"batch\['inputs'\]\[0\] has weight 0, and numbers that are not finite; in training, batch"
    )
    with pytest.raises(DataError, match=said):
        pipe.value_and_grad(pipe.init(0), batch)
    assert np.isfinite(pipe.evaluate(pipe.init(0), batch).loss), "evaluation counts no example"


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            [1, -1, 3, 1, 1, 1, 1, 1],
            r"batch\['weights'\]\[1\] is -1.0; a weight must be finite and",
        ),
        ([1, 1, np.inf, 1, 1, 1, 1, 1], r"batch\['weights'\]\[2\] is inf"),
        (np.full(8, 1e308), "must have a finite sum"),
    ],
)
def test_weights_that_mean_nothing_are_refused(pipe, weights, said):
    state, batch = pipe.init(0), make_batch(weights=weights)
    trainer = gpipe.Trainer(pipe, optax.sgd(0.1))
    for refused in (pipe.value_and_grad, pipe.evaluate):
        with pytest.raises(DataError, match=said):
            refused(state, batch)
    with pytest.raises(DataError, match=said):
        trainer.evaluate(state, iter([make_batch(), batch]))


def test_weights_of_several_batches_that_overflow_are_refused(pipe):
    batches = [make_batch(weights=np.full(8, 2e307)) for _ in range(2)]
    trainer = gpipe.Trainer(pipe, optax.sgd(0.1))
    with pytest.raises(
        DataError, match="the weights of all batches must have a finite sum, got inf"
    ):
        trainer.evaluate(pipe.init(0), iter(batches))
