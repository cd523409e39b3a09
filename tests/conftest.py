"""Tests run on 16 simulated CPU devices."""

import os

# A collective that hangs should end the run with a message, not stall it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=120"
)
# Libraries found on a machine without a TPU must not look for one.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import gpipe_jax

gpipe_jax.simulate_devices(16)
