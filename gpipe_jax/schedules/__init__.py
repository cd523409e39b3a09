"""Decide who does what, when: pure numpy, no JAX."""

from gpipe_jax.schedules.schedule import (
    BACKWARD,
    FORWARD,
    IDLE,
    Schedule,
    eager_1f1b,
    forward_only,
    gpipe,
    interleaved,
    make,
    one_f_one_b,
    simulate,
    training_schedule,
)

__all__ = [
    "BACKWARD",
    "FORWARD",
    "IDLE",
    "Schedule",
    "eager_1f1b",
    "forward_only",
    "gpipe",
    "interleaved",
    "make",
    "one_f_one_b",
    "simulate",
    "training_schedule",
]
