"""Compiling for TPU pods that are not here, with the real TPU compiler.

libtpu compiles for any topology with no TPU present. It is loaded in a process of its own, so that
this one keeps its backend, its environment and its standard error; `compile_child` is what runs
there.
"""

import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import jax
import jax.export

import gpipe_jax
from gpipe_jax.tpu_compiler import cache
from gpipe_jax.tpu_compiler.libtpu import check_installed
from gpipe_jax.tpu_compiler.results import Compiled, Program, too_large
from gpipe_jax.tpu_compiler.topologies import Topology
from gpipe_jax.utils.text import GIB

SHOW_EVERY_S = 3.0
_TICK_S = 0.2  # how late a time-out may come
# No TPU is looked for, other users of libtpu are not waited for, and its log is no one's concern.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def compile_programs(
    programs: Sequence[Program],
    topology: Topology,
    *,
    timeout_s: float | None = None,
    show: Callable[[str], None] | None = None,
) -> list[Compiled]:
    """Compile all of them for `topology`, or find them among the results of earlier runs.

    No program may take longer than `timeout_s`. `show` is told every few seconds what is being
    compiled and for how long. A program that does not fit is a result; its `error` says so.
    """
    for program in programs:
        _check(program, topology)
    if not programs:
        return []
    check_installed()
    keys = [cache.key_of(program, topology) for program in programs]
    results = {key: found for key in keys if (found := cache.load(key))}
    missing = {k: p for k, p in zip(keys, programs, strict=True) if k not in results}
    if missing:
        # Closed at once when we are interrupted, not when the traceback lets go of it.
        with closing(_compile(list(missing.values()), topology, timeout_s, show)) as compiled:
            for key, result in zip(missing, compiled, strict=True):
                results[key] = result
                if result.error is None or result.short_by_bytes is not None:
                    cache.save(key, result)
    found = [results[k]._replace(name=p.name) for k, p in zip(keys, programs, strict=True)]
    # The compiler lets programs pass that need a little more than it calls usable: we don't.
    usable = round(topology.generation.hbm_gib * GIB)
    fits = lambda x: x.error is not None or x.needed_bytes <= usable  # noqa: E731
    return [result if fits(result) else too_large(result, usable) for result in found]


def _check(program: Program, topology: Topology) -> None:
    stages, data = program.mesh_shape
    if stages * data > topology.devices:
        raise ValueError(
            f"{program.name}: a mesh of {stages} stages x {data} data replicas needs "
            f"{stages * data} devices, but {topology} has {topology.devices}; lower `stages` or "
            f"`data`, or take a larger topology"
        )
    if program.exported.nr_devices != stages * data:
        raise ValueError(
            f"{program.name}: exported for {program.exported.nr_devices} device(s), but "
            f"`mesh_shape` is {program.mesh_shape}; export it with shardings on such a mesh"
        )
    count = len(program.exported.in_avals)
    if any(not 0 <= i < count for i in program.donate):
        raise ValueError(
            f"{program.name}: `donate` {program.donate} names an argument that is not there; "
            f"flattened, the program has {count}"
        )
    if topology.slices == 1 or stages * data == 1:
        return
    if stages % topology.slices:
        raise ValueError(
            f"{program.name}: {stages} stages do not divide by {topology.slices} slices; stages "
            f"go across slices, so make `stages` a multiple of `slices`"
        )
    if stages * data < topology.devices:  # the compiler takes no part of several slices
        raise ValueError(
            f"{program.name}: a mesh of {stages} stages x {data} data replicas leaves some of the "
            f"{topology.devices} devices of {topology} idle, which several slices can't; raise "
            f"`stages` or `data`, or take smaller slices"
        )


def _compile(
    programs: Sequence[Program],
    topology: Topology,
    timeout_s: float | None,
    show: Callable[[str], None] | None,
) -> Generator[Compiled]:
    with tempfile.TemporaryDirectory(prefix="gpipe-plan-") as folder:
        _write_job(Path(folder), programs, topology)
        with _child(folder) as (process, replies):
            for i, program in enumerate(programs):
                what = f"{program.name} for {topology}"
                began, position = time.monotonic(), f"{i + 1} of {len(programs)}"
                due = SHOW_EVERY_S
                while (reply := _next(replies)) is None:
                    elapsed = time.monotonic() - began
                    if timeout_s is not None and elapsed > timeout_s:
                        raise TimeoutError(
                            f"compiling {what} ({position}) took longer than `timeout_s` "
                            f"{timeout_s:g} s and was ended; raise it, or plan a smaller program"
                        )
                    if show and elapsed >= due:
                        show(f"compiling {what} ({position}), {elapsed:.0f} s")
                        due = elapsed + SHOW_EVERY_S
                if not reply.endswith(b"\n"):  # no line, or half of one
                    raise RuntimeError(_obituary(process, what, Path(folder)))
                yield Compiled.from_dict(json.loads(reply))


def _write_job(folder: Path, programs: Sequence[Program], topology: Topology) -> None:
    for i, program in enumerate(programs):
        (folder / f"{i}.bin").write_bytes(_flat(program.exported).serialize())
    job = {
        "options": topology.options(),
        "programs": [(p.name, p.donate, p.mesh_shape) for p in programs],
    }
    (folder / "job.json").write_text(json.dumps(job))


def _flat(exported: jax.export.Exported) -> jax.export.Exported:
    """The same, from a flat list of arguments to one of results.

    Node types of the user's (a NamedTuple, say) could not be written without being registered, and
    need not exist in the other process.
    """
    arguments = jax.tree.structure((tuple(exported.in_avals), {}))
    return dataclasses.replace(
        exported, in_tree=arguments, out_tree=jax.tree.structure(list(exported.out_avals))
    )


@contextmanager
def _child(folder: str) -> Iterator[tuple[subprocess.Popen[bytes], "queue.Queue[bytes]"]]:
    """The process and what it replies, a line for each program; killed however we leave."""
    with open(Path(folder) / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpipe_jax.tpu_compiler.child_process", folder],
            stdin=subprocess.PIPE,  # its end tells the child that we are gone
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
            start_new_session=True,  # an interruption is ours to handle
        )
    replies: queue.Queue[bytes] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, replies), daemon=True)
    try:
        reader.start()
        yield process, replies
    finally:
        process.kill()
        process.wait()
        reader.join()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _environment() -> dict[str, str]:
    path = [str(Path(gpipe_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    found.pop("XLA_FLAGS", None)  # they are meant for this machine's backend
    return found


def _read(process: subprocess.Popen[bytes], replies: "queue.Queue[bytes]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        replies.put(line)
    replies.put(b"")


def _next(replies: "queue.Queue[bytes]") -> bytes | None:
    """The next line, b"" if there are no more, None if there is none yet."""
    try:
        return replies.get(timeout=_TICK_S)
    except queue.Empty:
        return None


def _obituary(process: subprocess.Popen[bytes], what: str, folder: Path) -> str:
    code = process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if code == -9:
        how += ", probably as this machine ran out of memory"
    last = (folder / "log").read_text(errors="replace").strip().splitlines()[-8:]
    return "\n".join([f"the TPU compiler's process {how} while compiling {what}", *last])
