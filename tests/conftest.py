"""Tests run on 16 simulated CPU devices."""

import os

os.environ["XLA_FLAGS"] = (
    # A collective that hangs should end the run with a message, not stall it.
    "--xla_cpu_collective_call_terminate_timeout_seconds=120 "
    # Programs run once on little data: optimizing their machine code takes half of the time.
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    + os.environ.get("XLA_FLAGS", "")
)
# Libraries found on a machine without a TPU must not look for one.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import gpipe_jax

gpipe_jax.simulate_devices(16)
