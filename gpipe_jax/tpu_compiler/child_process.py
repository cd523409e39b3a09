"""Compile programs in the child process that loads libtpu.

The folder holds a job (job.json) and the exported programs (0.bin, 1.bin, ...). The process prints
each result as a line of JSON on standard output as soon as it is ready. It exits when its standard
input closes, so that it never outlives its parent.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
from jax.experimental import topologies
from jax.sharding import Mesh

from gpipe_jax.distributed.mesh import make_mesh, replicated_sharding
from gpipe_jax.tpu_compiler.hlo import Module
from gpipe_jax.tpu_compiler.results import Compiled, failed


def main(folder: Path) -> None:
    """Compile the job's programs one after the other."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries must not print between the replies
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads((folder / "job.json").read_text())
    devices = topologies.get_topology_desc(**job["options"]).devices
    for i, (name, donate, (stages, data)) in enumerate(job["programs"]):
        start = time.monotonic()
        try:
            exported = jax.export.deserialize(bytearray((folder / f"{i}.bin").read_bytes()))
            mesh = _mesh(stages, data, devices)
            result = _compile(name, exported, donate, mesh)
        except Exception as e:
            result = failed(name, time.monotonic() - start, str(e))
        print(json.dumps(result.to_dict()), file=replies)


def _mesh(stages: int, data: int, devices: Sequence[Any]) -> Mesh:
    if stages * data < len(devices):
        # libtpu 0.0.42 refuses collectives over some subsets of a slice, such as devices 0, 1, 4
        # and 5 of 16 ("Unexpected device_id"), but none over its first devices.
        devices = sorted(devices, key=lambda device: device.id)
    return make_mesh(stages=stages, data=data, devices=devices)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def _compile(
    name: str, exported: jax.export.Exported, donate: Sequence[int], mesh: Mesh
) -> Compiled:
    start = time.monotonic()
    replicated = replicated_sharding(mesh)
    specs = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding or replicated)
        for aval, sharding in zip(exported.in_avals, exported.in_shardings_jax(mesh), strict=True)
    ]
    jitted = jax.jit(
        exported.call,
        donate_argnums=tuple(donate),
        out_shardings=list(exported.out_shardings_jax(mesh)),
    )
    compiled = jitted.lower(*specs).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None
    compile_s = time.monotonic() - start
    module = Module(text)
    return Compiled(
        name,
        compile_s,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        needed_bytes=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        cycles=module.cycles(),
        collectives=tuple(module.collectives()),
        endless_loops=sum(loop.trips is None for loop in module.loops()),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
