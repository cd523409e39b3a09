"""Compiled results, kept on disk between runs.

A compilation takes from seconds to minutes and depends on nothing but the program, the topology and
the versions.
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


def key_of(program: Program, topology: Topology) -> str:
    """A name for the result: a hash of all that it depends on."""
    parts = (
        *(inspect.getsource(module) for module in (hlo, results, child_process)),  # who read it
        _without_locations(program.exported.mlir_module()),
        program.donate,
        program.mesh_shape,
        topology.options(),
        {k: v for k, v in versions().items() if k != "libtpu_pinned"},
        os.environ.get("LIBTPU_INIT_ARGS"),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


_LOCATION = re.compile(r' ?\bloc\((?:"[^"]*"|[^()"]|\((?:"[^"]*"|[^()"]|\([^()]*\))*\))*\)')


def _without_locations(text: str) -> str:
    """An MLIR text without line numbers, which move when unrelated code does."""
    lines = (line for line in text.splitlines() if not line.startswith("#loc"))
    return "\n".join(_LOCATION.sub("", line) for line in lines)


def folder() -> Path:
    """Where they are."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gpipe-jax" / "plan"


def load(key: str) -> Compiled | None:
    """A damaged file is as good as none."""
    try:
        return Compiled.from_dict(json.loads((folder() / f"{key}.json").read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def save(key: str, result: Compiled) -> None:
    """Atomically, as several plans may run at once; without a place to write, not at all."""
    place = folder()
    with suppress(OSError, RuntimeError):
        place.mkdir(parents=True, exist_ok=True)
        atomic_files.write_text(place / f"{key}.json", json.dumps(result.to_dict()))
