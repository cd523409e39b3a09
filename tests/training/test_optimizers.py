"""Optimizers of a config against recurrences written out in numpy, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpipe_jax.config.optimizers import AdamConfig, OptimizerConfig, RmsPropConfig, SgdConfig
from gpipe_jax.training import elementwise, optimizers

STEPS = 3


def fixed_numbers(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {"matrix": rng.normal(size=(3, 2)), "vector": rng.normal(size=4)}


PARAMS, *GRADIENTS = [fixed_numbers(seed) for seed in range(STEPS + 1)]


def run(config: OptimizerConfig, steps: int = 100) -> dict:
    """Return the parameters after three steps of the optimizer under test."""
    with jax.enable_x64(True):
        tx = optax.with_extra_args_support(optimizers.build(config, steps))
        params = jax.tree.map(jnp.asarray, PARAMS)
        state, decaying = tx.init(params), optimizers.decaying(params)
        for grads in GRADIENTS:
            updates, state = tx.update(grads, state, params, decaying=decaying)
            params = optax.apply_updates(params, updates)
        return jax.tree.map(np.asarray, params)


def by_hand(step, rates, *, weight_decay=0.0, l2=0.0, clip_norm=np.inf) -> dict:
    """Do the same by hand: `step(gradient, memory, rate)` changes `memory`, a dict per array."""
    params = {name: a.copy() for name, a in PARAMS.items()}
    memory: dict = {name: {"t": 0, "v": 0.0, "m": 0.0, "ms": 1.0} for name in params}
    for rate, grads in zip(rates, GRADIENTS, strict=True):
        decays = {name: float(p.ndim > 1) for name, p in params.items()}
        grads = {name: g + l2 * decays[name] * params[name] for name, g in grads.items()}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for name, p in params.items():
            memory[name]["t"] += 1
            taken = step(grads[name] * min(1.0, clip_norm / norm), memory[name], rate)
            params[name] = p - taken - rate * weight_decay * decays[name] * p
    return params


def momentum(g, memory, rate, mu=0.8):
    memory["m"] = g + mu * memory["m"]
    return rate * memory["m"]


def nesterov(g, memory, rate, mu=0.8):
    return rate * g + mu * momentum(g, memory, rate, mu)


def adam(g, memory, rate, b1=0.7, b2=0.9, eps=1e-3):
    memory["m"] = b1 * memory["m"] + (1 - b1) * g
    memory["v"] = b2 * memory["v"] + (1 - b2) * g**2
    mean, square = memory["m"] / (1 - b1 ** memory["t"]), memory["v"] / (1 - b2 ** memory["t"])
    return rate * mean / (np.sqrt(square) + eps)


def rmsprop(g, memory, rate, decay=0.6, eps=0.2, mu=0.8):
    """Update as TensorFlow's documentation says; its mean square starts at 1."""
    memory["ms"] = decay * memory["ms"] + (1 - decay) * g**2
    memory["m"] = mu * memory["m"] + rate * g / np.sqrt(memory["ms"] + eps)
    return memory["m"]


KINDS = {
    "momentum": (SgdConfig, {"momentum": 0.8}, momentum),
    "nesterov": (SgdConfig, {"momentum": 0.8, "nesterov": True}, nesterov),
    "adamw": (AdamConfig, {"b1": 0.7, "b2": 0.9, "eps": 1e-3}, adam),
    "rmsprop": (RmsPropConfig, {"decay": 0.6, "eps": 0.2, "momentum": 0.8}, rmsprop),
}
EXTRAS = {
    "plain": {},
    "decay": {"weight_decay": 0.3},
    "l2": {"l2": 0.3},
    "clipped": {"clip_norm": 0.5},
    "all": {"weight_decay": 0.2, "l2": 0.3, "clip_norm": 0.5},
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_by_hand(kind, extra):
    """Use a falling rate: applied inside or outside the velocity, it makes a difference."""
    model, arguments, step = KINDS[kind]
    falling = {"schedule": "exponential", "decay_rate": 0.5, "decay_steps": 1}
    config = model(learning_rate=0.1, **falling, **arguments, **EXTRAS[extra])
    wanted = by_hand(step, [0.1, 0.05, 0.025], **EXTRAS[extra])
    have = run(config)
    for name in wanted:  # optax keeps learning rates in float32, 0.1 too
        np.testing.assert_allclose(have[name], wanted[name], rtol=1e-6, atol=1e-8, err_msg=name)


def test_rmsprop_may_start_from_zero():
    """Then the first step divides by the root of (1 - decay) g^2 + eps."""
    config = RmsPropConfig(learning_rate=0.1, schedule="constant", initial=0.0, eps=1e-8)
    with jax.enable_x64(True):
        tx = optimizers.build(config, 10)
        update, _ = tx.update(jnp.asarray([2.0]), tx.init(jnp.zeros(1)))
    np.testing.assert_allclose(np.asarray(update), [-0.1 / np.sqrt(0.1)], rtol=1e-6)


@pytest.mark.parametrize("field", ["weight_decay", "l2"])
def test_decay_leaves_vectors_alone(field):
    plain, decayed = (
        run(SgdConfig.model_validate({"learning_rate": 0.1, "schedule": "constant", field: rate}))
        for rate in (0, 0.5)
    )
    np.testing.assert_array_equal(plain["vector"], decayed["vector"])
    assert np.abs(plain["matrix"] - decayed["matrix"]).max() > 1e-3


# --- schedules -----------------------------------------------------------------------------------


def rates(steps: int, **options) -> np.ndarray:
    schedule = optimizers.learning_rate(SgdConfig(learning_rate=0.5, **options), steps)
    return np.array([np.asarray(schedule(jnp.asarray(s))) for s in range(steps)])


def test_constant_after_a_linear_warm_up():
    np.testing.assert_allclose(
        rates(6, schedule="constant", warmup_steps=4), [0, 0.125, 0.25, 0.375, 0.5, 0.5]
    )


def test_no_warm_up_starts_at_the_peak():
    np.testing.assert_allclose(rates(3, schedule="constant"), [0.5, 0.5, 0.5])


def test_cosine_falls_to_zero_over_the_steps_after_the_warm_up():
    t = np.arange(8) / 8
    wanted = [0, 0.25, *(0.25 * (1 + np.cos(np.pi * t)))]
    np.testing.assert_allclose(rates(10, schedule="cosine", warmup_steps=2), wanted, rtol=1e-5)


def test_exponential_applies_its_factor_once_in_decay_steps():
    have = rates(7, schedule="exponential", warmup_steps=1, decay_rate=0.25, decay_steps=2)
    np.testing.assert_allclose(have, [0, *(0.5 * 0.25 ** (np.arange(6) / 2))], rtol=1e-5)


def test_a_staircase_applies_its_factor_at_once():
    have = rates(
        7, schedule="exponential", warmup_steps=1, decay_rate=0.25, decay_steps=2, staircase=True
    )
    np.testing.assert_allclose(have, [0, 0.5, 0.5, 0.125, 0.125, 0.03125, 0.03125], rtol=1e-6)


def test_a_run_follows_its_schedule():
    config = SgdConfig(learning_rate=0.5, momentum=0, schedule="constant", warmup_steps=2)
    wanted = by_hand(lambda g, _, rate: rate * g, [0, 0.25, 0.5])
    np.testing.assert_allclose(run(config)["matrix"], wanted["matrix"], rtol=1e-6)


@pytest.mark.parametrize("warmup_steps", [10, 11])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup_steps):
    config = SgdConfig(warmup_steps=warmup_steps)
    match = f"`warmup_steps` {warmup_steps} .* 10 steps .*; use at most 9"
    with pytest.raises(ValueError, match=match):
        optimizers.build(config, 10)


def test_an_unknown_kind_is_refused():
    with pytest.raises(TypeError, match="no optimizer for OptimizerConfig"):
        optimizers.build(OptimizerConfig(kind="sgd"), 10)


# --- elementwise or not --------------------------------------------------------------------------


def late(make, *args, **kwargs):
    """Return a transformation under a warm-up so long that its first updates are tiny."""
    return optax.chain(
        make(*args, **kwargs), optax.scale_by_schedule(optax.linear_schedule(0, 1, 10**6))
    )


def late_clip(clip: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(clip, optax.sgd(zero_until(3)))


def zero_until(step: int, rate: float = 0.1):
    """Return a learning rate that is zero for so many steps."""
    return lambda count: jnp.where(count < step, 0.0, rate)


def accumulated(tx: optax.GradientTransformation, steps: int = 3) -> optax.GradientTransformation:
    return optax.MultiSteps(tx, steps).gradient_transformation()


def trust_ratio_from(step: int) -> optax.GradientTransformation:
    late_ratio = optax.transforms.conditionally_transform(
        optax.scale_by_trust_ratio(), lambda count: count >= step
    )
    return optax.chain(optax.scale_by_adam(), late_ratio, optax.scale(-0.1))


def logical_mask() -> optax.GradientTransformation:
    return optax.masked(optax.scale(2.0), {"a": True, "b": False})


def mask_by_rank() -> optax.GradientTransformation:
    return optax.masked(
        optax.scale(2.0), lambda tree: jax.tree.map(lambda a: jnp.ndim(a) > 1, tree)
    )


def convolutions_decay() -> optax.GradientTransformation:
    return optax.adamw(1e-3, mask=lambda tree: jax.tree.map(lambda a: a.ndim == 4, tree))


def twice_if_of_rank(rank: int) -> optax.GradientTransformation:
    """Do what a mask does, in own code."""

    def double(a):
        return a * 2 if jnp.ndim(a) == rank else a

    return optax.stateless(lambda updates, _: jax.tree.map(double, updates))


def centred_if_large() -> optax.GradientTransformation:
    """Treat matrices as Adafactor does, from 128 on, but without a state that gives it away."""

    def centre(a):
        is_large = jnp.ndim(a) == 2 and min(a.shape) >= 128
        return a - a.mean(axis=0) if is_large else a

    return optax.stateless(lambda updates, _: jax.tree.map(centre, updates))


ACCEPTED = {
    "sgd": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9),
    "adamw of ours": lambda: optimizers.build(AdamConfig(weight_decay=0.1, clip_norm=1), 10**6),
    "rmsprop of ours": lambda: optimizers.build(
        RmsPropConfig(weight_decay=0.1, l2=0.1, clip_norm=1), 10**6
    ),
    "sgd of ours": lambda: optimizers.build(SgdConfig(l2=0.1, clip_norm=1, nesterov=True), 10**6),
    "a long warm-up": lambda: optimizers.build(AdamConfig(warmup_steps=10**5), 10**6),
    "clip": lambda: optax.chain(optax.clip(0.1), optax.sgd(0.1)),
    "clip_by_global_norm": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1)),
    "its rate in its state": lambda: optax.inject_hyperparams(optax.adam)(1e-3),
    "multi-steps": lambda: accumulated(optax.sgd(0.1), 2),
    "many multi-steps": lambda: accumulated(optax.adam(0.1), 50),
    "if finite": lambda: optax.apply_if_finite(optax.adam(0.1), 3),
    "a late rate": lambda: optax.adam(zero_until(3)),
    "a rate that the caller sets": lambda: optax.inject_hyperparams(optax.adam)(0.0),
    "a rate that ends": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 50)),
    "no change at all": optax.set_to_zero,
    "a rate of zero, without counters": lambda: optax.sgd(0.0, momentum=0.9),
}
REFUSED = {
    "lamb, multi-steps": lambda: accumulated(optax.lamb(0.1)),
    "lamb, many multi-steps": lambda: accumulated(optax.lamb(0.1), 50),
    "lamb, late rate": lambda: optax.lamb(zero_until(3)),
    "lars, late rate": lambda: optax.lars(zero_until(3)),
    "lamb, late rate, multi-steps": lambda: accumulated(optax.lamb(zero_until(2))),
    "lamb, late rate, if finite": lambda: optax.apply_if_finite(optax.lamb(zero_until(3)), 3),
    "lamb, the caller sets the rate": lambda: optax.inject_hyperparams(optax.lamb)(0.0),
    "block rms, late": lambda: late_clip(optax.clip_by_block_rms(1.0)),
    "a trust ratio from a step on": lambda: trust_ratio_from(50),
    "adafactor": lambda: optax.adafactor(1e-3),
    "factored rms alone": lambda: optax.scale_by_factored_rms(),
    "lamb": lambda: optax.lamb(1e-3),
    "lamb, long warm-up": lambda: late(optax.lamb, 1e-3),
    "lars": lambda: optax.lars(1e-3),
    "block rms": lambda: optax.clip_by_block_rms(1.0),
    "adaptive clipping": lambda: optax.adaptive_grad_clip(0.01),
    "noise": lambda: optax.add_noise(0.1, 0.5, 0),
    "a logical mask": logical_mask,
    "a mask by rank": mask_by_rank,
    "a mask by a rank that is rare": convolutions_decay,
    **{f"by rank {rank}": functools.partial(twice_if_of_rank, rank) for rank in (0, 2, 3, 4, 5)},
    "large matrices by column": centred_if_large,
    "factored above a size": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=10**4),
    "all in one vector": lambda: optax.flatten(optax.adam(1e-3)),
    "weights by path": lambda: optax.multi_transform(
        {"x": optax.sgd(0.1), "y": optax.sgd(1.0)}, {"a": "x", "b": "y"}
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_elementwise_transformations_are_accepted(name):
    elementwise.check_elementwise(ACCEPTED[name]())


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_the_grouping_is_refused(name):
    with pytest.raises(ValueError, match="depends on how parameters are grouped into arrays"):
        elementwise.check_elementwise(REFUSED[name]())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [2000, 10**5])
@pytest.mark.parametrize("accumulate", [1, 40])
def test_a_rate_that_is_zero_for_long(steps, accumulate):
    """Check steps that no trial reaches from the first one."""

    def make(optimizer):
        return accumulated(optimizer(zero_until(steps)), accumulate)

    elementwise.check_elementwise(make(optax.adam))
    with pytest.raises(ValueError, match="depends on how parameters are grouped into arrays"):
        elementwise.check_elementwise(make(optax.lamb))


@pytest.mark.parametrize("make", [optax.adam, pytest.param(optax.lamb, marks=pytest.mark.slow)])
def test_updates_that_are_all_zero_are_refused(make):
    match = (
        "every update .* was zero, in its first .* steps .*; use a learning rate that is not zero"
    )
    with pytest.raises(ValueError, match=match):
        elementwise.check_elementwise(make(0.0))


def test_a_transformation_that_makes_nan_is_refused():
    with pytest.raises(ValueError, match="use transformations of one parameter each"):
        elementwise.check_elementwise(optax.scale(float("nan")))


# --- moving average ------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_the_moving_average_by_hand(decay):
    """(1 + 8) / (10 + 8) is 0.5: that decay holds from step 8 on, the other one much later."""
    rng = np.random.default_rng(0)
    start, *values = rng.normal(size=(13, 3)).astype(np.float32)
    have, wanted = {"w": jnp.asarray(start)}, start.astype(np.float64)
    update = jax.jit(optimizers.moving_average, static_argnames="decay")
    for step, value in enumerate(values):
        have = update(have, {"w": jnp.asarray(value)}, jnp.uint32(step), decay=decay)
        now = min(decay, (1 + step) / (10 + step))
        wanted = now * wanted + (1 - now) * value
        np.testing.assert_allclose(have["w"], wanted, rtol=1e-5, atol=1e-6, err_msg=str(step))


def test_the_moving_average_keeps_its_type():
    """Check that the average of bfloat16 parameters is more exact than they are."""
    average, params = jnp.full(2, 1.003, jnp.float32), jnp.full(2, 3, jnp.bfloat16)
    moved = optimizers.moving_average(average, params, jnp.uint32(10**8), 0.99)
    assert moved.dtype == jnp.float32
    np.testing.assert_allclose(moved - average, 0.01 * (3 - 1.003), rtol=1e-4)


# --- parts of a state ----------------------------------------------------------------------------


def test_map_parameters_maps_what_is_like_the_parameters():
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}
    state = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)).init(params)
    mapped = optimizers.map_parameters(lambda tree: sorted(tree), state, params)
    adam_state = mapped[1][0]
    assert adam_state.mu == adam_state.nu == ["b", "w"]
    assert int(adam_state.count) == 0
    assert mapped[0] == optax.EmptyState()


@pytest.mark.parametrize(
    ("name", "shape", "decays"),
    [
        ("linear.kernel", (2, 2), True),
        ("embedding", (9, 2), True),
        ("scales.kernel", (2, 2), True),
        ("bias.kernel", (2, 2), True),
        ("unbiased", (2, 2), True),
        ("kernel", (2,), False),
        ("gain", (), False),
        ("query.bias", (2, 4), False),
        ("norm.scale", (4, 4), False),
        ("query_bias", (2, 4), False),
        ("layer_scale", (1, 1, 4), False),
    ],
)
def test_matrices_decay_that_are_neither_biases_nor_of_norms(name, shape, decays):
    assert optimizers.decays(name, shape) == decays
    tree: dict = {"layer": np.ones(shape)}
    for key in reversed(name.split(".")):
        tree = {key: tree.get("layer", tree)}
    assert jax.tree.leaves(optimizers.decaying([tree])) == [decays]
