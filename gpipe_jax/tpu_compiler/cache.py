"""Cache compiled results on disk between runs.

A compilation takes seconds to minutes. Its result depends only on the program, the topology and the
versions.
"""

import hashlib
import inspect
import json
import os
import re
from contextlib import suppress
from pathlib import Path

from gpipe_jax.tpu_compiler import child_process, hlo, results
from gpipe_jax.tpu_compiler.libtpu import versions
from gpipe_jax.tpu_compiler.results import Compiled, Program
from gpipe_jax.tpu_compiler.topologies import Topology
from gpipe_jax.utils import atomic_files

# Environment variables that change the results of the compiler.
_VARIABLES = ("LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL", "JAX_MEMORY_FITTING_LEVEL")


def key_of(program: Program, topology: Topology) -> str:
    """Return the name of the result: a hash of everything that it depends on."""
    inputs = (
        *(inspect.getsource(module) for module in (hlo, results, child_process)),
        _without_locations(program.exported.mlir_module()),
        program.donate,
        program.mesh_shape,
        topology.options(),
        {k: v for k, v in versions().items() if k != "libtpu_pinned"},
        [os.environ.get(name) for name in _VARIABLES],
    )
    return hashlib.sha256(repr(inputs).encode()).hexdigest()


_LOCATION = re.compile(r' ?\bloc\((?:"[^"]*"|[^()"]|\((?:"[^"]*"|[^()"]|\([^()]*\))*\))*\)')


def _without_locations(text: str) -> str:
    """Remove line numbers from an MLIR text: they change with unrelated code."""
    lines = (line for line in text.splitlines() if not line.startswith("#loc"))
    return "\n".join(_LOCATION.sub("", line) for line in lines)


def folder() -> Path:
    """Return the folder of the cached results."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gpipe-jax" / "plan"


def load(key: str) -> Compiled | None:
    """Return a cached result, or None if its file is missing or damaged."""
    try:
        return Compiled.from_dict(json.loads((folder() / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def save(key: str, result: Compiled) -> None:
    """Write a result atomically, as several plans may run at once.

    A result that cannot be written is not cached.
    """
    root = folder()
    with suppress(OSError, RuntimeError):
        root.mkdir(parents=True, exist_ok=True)
        text = json.dumps(result.to_dict())
        atomic_files.write_text(root / f"{key}.json", text)
