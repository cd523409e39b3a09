"""Tests run on 16 simulated CPU devices."""

import os
import sys
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = (
    # A collective that hangs should end the run with a message, not stall it.
    "--xla_cpu_collective_call_terminate_timeout_seconds=120 "
    # Programs run once on little data: optimizing their machine code takes half of the time, and
    # the emitters of fusions a third of the rest. (XLA ends the process if it knows no such flag.)
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false " + os.environ.get("XLA_FLAGS", "")
)
# Libraries found on a machine without a TPU must not look for one.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import gpipe_jax

gpipe_jax.simulate_devices(16)


@pytest.fixture(autouse=True)
def no_module_left(tmp_path_factory: pytest.TempPathFactory):
    """What a test wrote and imported is forgotten: the next test's file may have its name."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(tmp_path_factory.getbasetemp()):
            del sys.modules[name]
