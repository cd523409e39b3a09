"""Decide who does what, when: pure numpy, no JAX."""

from gpipe_jax.schedules.generators import (
    eager_1f1b,
    forward_only,
    gpipe,
    interleaved,
    make,
    one_f_one_b,
    training_schedule,
)
from gpipe_jax.schedules.schedule import BACKWARD, FORWARD, IDLE, Schedule, render
from gpipe_jax.schedules.simulation import simulate

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
    "render",
    "simulate",
    "training_schedule",
]
