"""Check that each wrong way to build or feed a pipeline has its own message."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

import gpipe_jax as gpipe

EXAMPLES = 12


def make_example(examples: int = EXAMPLES, **changes) -> dict:
    batch = {"inputs": np.zeros((examples, 4), np.float32), "labels": np.zeros(examples, np.int32)}
    return {**batch, **changes}


def build(layers=None, *, stages: int = 2, data: int = 1, **changes) -> gpipe.Pipeline:
    arguments = {
        "loss": gpipe.losses.softmax_cross_entropy,
        "example": make_example(),
        "micro_batches": 3,
        **changes,
    }
    mesh = gpipe.make_mesh(stages=stages, data=data)
    return gpipe.Pipeline(layers or gpipe.zoo.mlp((4, 6, 6, 3)), mesh=mesh, **arguments)


@pytest.fixture(scope="module")
def pipe() -> gpipe.Pipeline:
    return build()


@pytest.fixture(scope="module")
def trees(pipe) -> list:
    return jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), [s.params for s in pipe.shapes])


# --- building ------------------------------------------------------------------------------------


def test_more_stages_than_layers():
    with pytest.raises(ValueError, match=r"cut 3 layers into 4 stages.*use 1 to 3 stages"):
        build(stages=4)


def test_a_mesh_larger_than_the_devices():
    have = jax.device_count()
    message = (
        rf"{have + 1} stages x 2 data replicas needs {2 * have + 2} devices, but only {have} "
        rf"(is|are) available .*simulate_devices\({2 * have + 2}\)"
    )
    with pytest.raises(ValueError, match=message):
        build(stages=have + 1, data=2)


@pytest.mark.parametrize(
    ("examples", "data", "message"),
    [
        (10, 1, r"batch_size 10 is not a multiple of .* = 1 x 3 = 3; nearest legal values: 9, 12"),
        (4, 2, r"batch_size 4 is not a multiple of .* = 2 x 3 = 6; nearest legal values: 6"),
    ],
)
def test_examples_that_do_not_split(examples, data, message):
    with pytest.raises(ValueError, match=message):
        build(data=data, example=make_example(examples))


@pytest.mark.parametrize("remat", ["none", "", None])
def test_an_unknown_remat(remat):
    with pytest.raises(ValueError, match=f"`remat` must be 'stage' or 'layer', got {remat!r}"):
        build(remat=remat)


@pytest.mark.parametrize("keys_per", ["batch", "", None])
def test_unknown_owners_of_keys(keys_per):
    message = f"`keys_per` must be 'micro_batch' or 'example', got {keys_per!r}"
    with pytest.raises(ValueError, match=message):
        build(keys_per=keys_per)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "eager_1f1b"])
def test_chunks_with_a_schedule_that_has_none(schedule):
    message = f"'{schedule}' has one chunk on each device, got `chunks` 2; use 'interleaved'"
    with pytest.raises(ValueError, match=message):
        build(schedule=schedule, chunks=2)


def test_chunks_below_one():
    with pytest.raises(ValueError, match="`chunks` must be a whole number of at least 1, got 0"):
        build(schedule="interleaved", chunks=0)


def test_more_chunks_than_layers():
    with pytest.raises(ValueError, match=r"cut 3 layers into 4 stages.*use 1 to 3 stages"):
        build(schedule="interleaved", chunks=2)


def test_boundaries_of_all_chunks():
    layers = gpipe.zoo.mlp((4, 6, 6, 6, 3))
    with pytest.raises(ValueError, match="4 stages need 3 boundaries, got 1"):
        build(layers, schedule="interleaved", chunks=2, partition=[2])
    message = "`partition` must be 'auto' or the first layer of stages 1 to 3, got 'even'"
    with pytest.raises(ValueError, match=message):
        build(layers, schedule="interleaved", chunks=2, partition="even")


def test_no_layers():
    with pytest.raises(ValueError, match="`layers` is empty; give at least one layer"):
        gpipe.Pipeline(
            [],
            loss=gpipe.losses.softmax_cross_entropy,
            mesh=gpipe.make_mesh(stages=1),
            example=make_example(),
        )


def test_no_mesh():
    with pytest.raises(ValueError, match="`mesh` must be a mesh of devices, got NoneType; give"):
        gpipe.Pipeline(
            gpipe.zoo.mlp((4, 3)),
            loss=gpipe.losses.softmax_cross_entropy,
            mesh=None,  # type: ignore[arg-type]
            example=make_example(),
        )


@pytest.mark.parametrize(
    ("axes", "kind"),
    [(("x",), "Auto"), (("data", "stage"), "Auto"), (("stage", "data"), "Explicit")],
)
def test_a_mesh_of_other_axes(axes, kind):
    """Check other names, another order, and another type."""
    types = (AxisType[kind],) * len(axes)
    shape = (2, 1)[: len(axes)]
    mesh = jax.make_mesh(shape, axes, types, devices=jax.devices()[:2])
    message = rf"`mesh` has the axes \('{axes[0]}',.*\) \({kind}.*'stage' and 'data' in this order"
    with pytest.raises(ValueError, match=message):
        gpipe.Pipeline(
            gpipe.zoo.mlp((4, 3)),
            loss=gpipe.losses.softmax_cross_entropy,
            mesh=mesh,
            example=make_example(),
        )


def test_links_that_do_not_match():
    layers = gpipe.zoo.mlp((4, 6, 6, 3))
    layers[2] = layers[2].pop("a")
    with pytest.raises(ValueError, match=r"layer 2, Dense\(.*\) \[pop a\], pops 'a', but no layer"):
        build(layers)


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule 'zb'; known: gpipe, 1f1b"):
        build(schedule="zb")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"inputs": np.zeros((12, 4))}, r"missing \['labels'\], unknown \[\]"),
        (make_example(weight=np.ones(12)), r"missing \[\], unknown \['weight'\]"),
        (make_example(labels=np.zeros(11, int)), r"example\['labels'\] has shape \[11\].* 12 ex"),
        (make_example(weights=np.ones(13)), r"weights'\] has shape \[13\], but the batch has 12"),
        (make_example(weights=np.ones((12, 1))), r"shape \[12, 1\] and .*; give one real number"),
        (make_example(weights=np.ones(12, complex)), r"type complex128; give one real number"),
        (make_example(labels=np.full(12, "a")), r"example\['labels'\] has type <U1; use an array"),
        (
            make_example(inputs=[[1.0, 2.0], [3.0]]),
            r"example\['inputs'\] is not an array of",
        ),
        (
            (np.zeros((12, 4)), np.zeros(12)),
            r"a batch is a dict .*; got a tuple; of a pair \(x, y\)",
        ),
        (make_example(labels=np.zeros((), int)), r"example\['labels'\] has shape \[\]"),
    ],
)
def test_a_malformed_example(example, message):
    with pytest.raises(ValueError, match=message):
        build(example=example)


def test_layers_that_do_not_fit():
    layers = [*gpipe.zoo.mlp((4, 6, 6)), *gpipe.zoo.mlp((5, 3))]
    message = (
        r"layer 2, Dense\(in_features=5, .*, does not take the output of layer 1, "
        r"Dense\(in_features=6, .*: float32\[4,6\]; make the two agree"
    )
    with pytest.raises(ValueError, match=message):
        build(layers)


def test_inputs_that_do_not_fit_the_first_layer():
    example = make_example(inputs=np.zeros((EXAMPLES, 5), np.float32))
    with pytest.raises(ValueError, match=r"layer 0, .* does not take the network's inputs: float"):
        build(example=example)


def test_a_loss_that_averages_over_the_examples():
    def loss(outputs, labels):
        return gpipe.losses.softmax_cross_entropy(outputs, labels)[0].mean()

    with pytest.raises(ValueError, match=r"an array \[4, ...\]; got shape \[\]; do not average"):
        build(loss=loss)


def test_metrics_that_average_over_the_examples():
    def loss(outputs, labels):
        return outputs.sum(-1), {"size": jnp.abs(outputs).mean()}

    with pytest.raises(ValueError, match=r"got shape \[\]; do not average over the examples"):
        build(loss=loss)


def test_labels_that_do_not_fit_the_loss():
    message = (
        r"`loss` does not take the outputs of layer 2, .*: float32\[4,3\], with labels int32\[4,2\]"
    )
    with pytest.raises(ValueError, match=message):
        build(example=make_example(labels=np.zeros((EXAMPLES, 2), np.int32)))


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([], "2 stages need 1 boundaries, got 0"),
        ([3], "boundary 3 is out of range: of 3 layers"),
        ([0], "boundary 0 is out of range"),
    ],
)
def test_bad_boundaries(boundaries, message):
    with pytest.raises(ValueError, match=message):
        build(partition=boundaries)


def test_boundaries_out_of_order():
    with pytest.raises(ValueError, match="boundaries must increase, got 2 then 1"):
        build(stages=3, partition=[2, 1])


def test_boundaries_as_an_array():
    assert build(stages=3, partition=np.array([1, 2])).partition.boundaries == (1, 2)


def test_costs_of_another_number_of_layers():
    with pytest.raises(ValueError, match=r"2 .*3|3 .*2"):
        build(cost=[1.0, 2.0])


def test_a_layer_too_large_for_the_memory():
    layers = gpipe.zoo.mlp((4, 512, 512, 3))
    message = r"layer 1 \(Dense\(in_features=512.*needs \d\.\d MiB, above memory_limit"
    with pytest.raises(ValueError, match=message):
        build(layers, memory_limit=2**20)


# --- feeding -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": np.zeros(3, int)}, r"missing \['inputs'\], unknown \[\]"),
        (make_example(mask=np.ones(12)), r"missing \[\], unknown \['mask'\]"),
        (make_example(13), r"has shape \[13, 4\], the pipeline's example had \[12, 4\]; only the"),
        (make_example(0), r"`inputs` has no examples"),
        (make_example(inputs=np.zeros((12, 5))), r"batch\['inputs'\] has shape \[12, 5\]"),
        (make_example(inputs={"x": np.zeros((12, 4))}), r"batch\['inputs'\] has structure"),
        (make_example(labels=np.zeros((12, 1), int)), r"batch\['labels'\] has shape \[12, 1\]"),
        (make_example(weights=np.zeros(12)), r"must sum to more than 0, got 0\.0"),
        (make_example(weights=np.full(12, np.nan)), r"\['weights'\]\[0\] is nan; a weight must be"),
        (make_example(weights=np.arange(12) - 2.0), r"\['weights'\]\[0\] is -2.0; .*; use 0 for"),
        (make_example(weights=[1] * 11 + [np.inf]), r"\[11\] is inf; a weight must be finite"),
        (make_example(weights=np.full(12, 1e308)), r"finite sum, got 12 of up to 1e\+308; divide"),
        (make_example(weights=np.ones(12, complex)), r"type complex128; give one real number"),
        ([np.zeros((12, 4)), np.zeros(12)], r"a batch is a dict .* got a list; of a pair"),
        (
            make_example(labels=["a"] * 12),
            r"\['labels'\]\[0\] is the text 'a', but .*each class",
        ),
        (make_example(labels=[[1], [2, 3]]), r"batch\['labels'\] is not an array of numbers"),
        (
            make_example(labels=np.full(12, "a")),
            r"has type <U1, .* pipeline takes int32; convert it",
        ),
        (make_example(labels=np.zeros(11, int)), r"(11|12).* examples"),
        (make_example(weights=np.ones(11)), r"(11|12).* examples"),
    ],
)
def test_a_malformed_batch(pipe, batch, message):
    with pytest.raises(ValueError, match=message):
        pipe.split(batch)


class Normed(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x)


class Square(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x)


@pytest.fixture(scope="module")
def normed() -> gpipe.Pipeline:
    return build([gpipe.layer(Normed), *gpipe.zoo.mlp((4, 3))])


def test_draws_that_are_not_of_examples():
    """Check random draws without an axis of examples, where each example has its own key."""

    def noise(params, x, rngs):
        return x if rngs is None else x + jax.random.normal(rngs, (1, 4))

    layers = [gpipe.layer(lambda key, x: {}, noise), *gpipe.zoo.mlp((4, 3))]
    message = r"first axis of what is drawn must be the 4 examples .*, got shape \[1, 4\]"
    pipe = build(layers, keys_per="example")
    with pytest.raises(ValueError, match=message):
        pipe.lower()
    build(layers).lower()


def test_apply_checks_its_inputs(pipe):
    with pytest.raises(ValueError, match=r"does not take inputs float32\[4,3\]; the pipeline's ex"):
        pipe.predict(pipe.init(0), np.zeros((2, 3)))


# --- parameters ----------------------------------------------------------------------------------


def test_parameters_for_another_number_of_layers(pipe, trees):
    with pytest.raises(ValueError, match="2 trees of parameters for 3 layers"):
        pipe.from_layers(trees[:2])


def test_parameters_of_another_shape(pipe, trees):
    trees = jax.tree.map(np.copy, trees)
    trees[1]["linear"]["kernel"] = np.zeros((6, 7), np.float32)
    message = r"layer 1, Dense\(.*\), has parameters .*\[6,6\].*, got .*\[6,7\]"
    with pytest.raises(ValueError, match=message):
        pipe.from_layers(trees)


def test_parameters_of_another_type(pipe, trees):
    """Check parameters that would be rounded, or make the state larger than compiled for."""
    half = jax.tree.map(lambda a: a.astype(ml_dtypes.bfloat16), trees)
    with pytest.raises(ValueError, match=r"layer 0, .* has parameters .*float32.*, got .*bfloat16"):
        pipe.from_layers(half)
    state = pipe.from_layers(jax.tree.map(lambda a: a.astype(np.float64), trees))
    assert {a.dtype for a in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}


def test_parameters_that_would_become_infinite(pipe, trees):
    wide = jax.tree.map(lambda a: a.astype(np.float64), trees)
    wide[1]["linear"]["kernel"][2, 3] = 1e39
    message = r"parameters of layer 1, 'linear.kernel', of float64 holds 1e\+39, .* takes float32"
    with pytest.raises(ValueError, match=message):
        pipe.from_layers(wide)


@pytest.mark.parametrize("change", ["renamed", "missing"])
def test_parameters_of_another_structure(pipe, trees, change):
    trees = jax.tree.map(np.copy, trees)
    bias = trees[2]["linear"].pop("bias")
    if change == "renamed":
        trees[2]["linear"]["bios"] = bias
    with pytest.raises(ValueError, match=re.escape("layer 2, Dense(")):
        pipe.from_layers(trees)


def test_statistics_that_do_not_fit(normed):
    params = [jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), s.params) for s in normed.shapes]
    with pytest.raises(ValueError, match="1 trees of statistics for 2 layers"):
        normed.from_layers(params, statistics=[{}])
    fits = {"norm": {"mean": np.zeros(4, np.float32), "var": np.ones(4, np.float32)}}
    wider = {"norm": {**fits["norm"], "var": np.ones(5, np.float32)}}
    message = r"layer 0, Normed\(\), has statistics .*var: float32\[4\].*, got .*float32\[5\]"
    with pytest.raises(ValueError, match=message):
        normed.from_layers(params, statistics=[wider, {}])
    with pytest.raises(ValueError, match=r"layer 1, Dense\(.*\), has statistics {}, got {norm: "):
        normed.from_layers(params, statistics=[fits, fits])


def test_parameters_where_a_tied_one_is_borrowed():
    """Check that a tied parameter is in its first layer, and None in the others."""
    tied = gpipe.layer(Square).tie("w", "linear.kernel")
    pipe = build([tied, tied], example=make_example(labels=np.zeros(EXAMPLES, int)))
    trees = pipe.to_layers(pipe.init(0))
    assert trees[1]["linear"]["kernel"] is None
    pipe.from_layers(trees)
    full = [trees[0], {"linear": {**trees[1]["linear"], "kernel": trees[0]["linear"]["kernel"]}}]
    message = r"layer 1, Square\(\) \[tie linear.kernel as w\], has parameters .*kernel: None"
    with pytest.raises(ValueError, match=message):
        pipe.from_layers(full)


def build_deep(**options):
    batch = {"inputs": np.ones((64, 32), np.float32), "labels": np.zeros(64, np.int32)}
    return gpipe.Pipeline(
        gpipe.zoo.mlp((32,) * 9),
        loss=gpipe.losses.softmax_cross_entropy,
        mesh=gpipe.make_mesh(stages=2),
        example=batch,
        micro_batches=16,
        **options,
    )


@pytest.mark.parametrize(
    "options", [{"schedule": "gpipe"}, {"schedule": "interleaved", "chunks": 2}]
)
def test_a_device_that_needs_more_than_the_limit(options):
    need = sum(build_deep(**options).device_bytes().values())
    build_deep(**options, memory_limit=need)
    with pytest.raises(ValueError, match=r"a device needs .* but `memory_limit` is"):
        build_deep(**options, memory_limit=need - 1)


def test_an_optimizer_that_needs_more_than_the_limit():
    """Check the limit with the optimizer; a pipeline alone assumes two slots."""
    need = sum(build_deep().device_bytes().values())
    pipe = build_deep(memory_limit=need + 4)  # and Adam's count
    gpipe.Trainer(pipe, optax.adam(0.1))
    with pytest.raises(ValueError, match=r"a device needs .* but `memory_limit` is"):
        gpipe.Trainer(pipe, optax.adam(0.1), ema=0.9)


def test_a_training_run_of_no_steps():
    with pytest.raises(ValueError, match="`steps` must be a whole number of at least 1, got 0"):
        build_deep(steps=0)
