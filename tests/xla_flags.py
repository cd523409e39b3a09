"""Choose the XLA flags of the tests: those that the installed jaxlib knows."""

import os
import subprocess
import sys

FLAGS = (
    # A collective that hangs must end the run with a message, not stall it.
    "--xla_cpu_collective_call_terminate_timeout_seconds=120",
    # Test programs run once on little data. Optimizing their machine code takes half of the
    # time, and the emitters of fusions take a third of the rest.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    # One piece of code for each program compiles a fifth faster than many for many threads.
    "--xla_cpu_parallel_codegen_split_count=1",
)
START_CPU = "import jax; jax.devices('cpu')"


def known_flags(flags: tuple[str, ...] = FLAGS) -> list[str]:
    """Return the flags that XLA accepts.

    XLA ends the process if it does not know a flag. A child process therefore tries them all,
    and XLA's message names the unknown ones. A flag's name may still occur in the library after
    its removal, so that a search of the binary proves nothing.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    child = subprocess.run(
        [sys.executable, "-c", START_CPU], env=environment, capture_output=True, text=True
    )
    if child.returncode == 0:
        return list(flags)
    unknown = child.stderr.partition("in XLA_FLAGS:")[2].splitlines()[:1]
    if not unknown:
        raise RuntimeError(f"JAX does not start with XLA_FLAGS={flags}:\n{child.stderr}")
    return [flag for flag in flags if flag not in unknown[0].split()]


def set_flags() -> None:
    """Put the known flags before those of the user in `XLA_FLAGS`.

    Workers of pytest-xdist inherit the variable from the process that controls them.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        flags = [*known_flags(), os.environ.get("XLA_FLAGS", "")]
        os.environ["XLA_FLAGS"] = " ".join(flags).strip()
