"""What runs in the process that has libtpu loaded.

The folder has a job (job.json) and the exported programs (0.bin, 1.bin, ...). Each result is a line
of JSON on standard output as soon as it is there. The process ends with its standard input, so that
it never outlives the one that started it.
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
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gpipe_jax.mesh import DATA, STAGE, make_mesh
from gpipe_jax.planning.compiled import Compiled, failed
from gpipe_jax.planning.hlo import Module


def main(folder: Path) -> None:
    """Compile the job's programs in turn."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not get between the replies
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads((folder / "job.json").read_text())
    devices = topologies.get_topology_desc(**job["options"]).devices
    for i, (name, donate, mesh_shape) in enumerate(job["programs"]):
        began = time.monotonic()
        try:
            exported = jax.export.deserialize(bytearray((folder / f"{i}.bin").read_bytes()))
            mesh = mesh_of(devices, mesh_shape, job["slices"])
            result = _compile(name, exported, donate, mesh)
        except Exception as e:
            result = failed(name, time.monotonic() - began, str(e))
        print(json.dumps(result.to_dict()), file=replies)


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def mesh_of(devices: Sequence[Any], shape: tuple[int, int], slices: int) -> Mesh:
    """A mesh of the first devices, with `stage` going across slices."""
    stages, data = shape
    need = stages * data
    if need < len(devices):
        return _mesh(np.asarray(devices[:need]).reshape(shape))  # may be no rectangle of chips
    if slices == 1:
        return make_mesh(stages=stages, data=data, devices=devices)
    return _mesh(
        mesh_utils.create_hybrid_device_mesh(
            (stages // slices, data), (slices, 1), devices, allow_split_physical_axes=True
        )
    )


def _mesh(grid: np.ndarray) -> Mesh:
    return Mesh(grid, (STAGE, DATA), axis_types=(AxisType.Auto,) * 2)


def _compile(
    name: str, exported: jax.export.Exported, donate: Sequence[int], mesh: Mesh
) -> Compiled:
    began = time.monotonic()
    everywhere = NamedSharding(mesh, PartitionSpec())
    specs = [
        jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding or everywhere)
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
    compile_s = time.monotonic() - began
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
