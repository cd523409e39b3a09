"""Compile for TPU slices with the real TPU compiler, on a machine without a TPU.

libtpu compiles for any topology with no TPU present. A child process loads it
(`child_process`), so that this process keeps its backend, its environment and its standard error.
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

from gpipe_jax.errors import ArgumentError
from gpipe_jax.tpu_compiler import cache
from gpipe_jax.tpu_compiler.libtpu import check_installed
from gpipe_jax.tpu_compiler.results import Compiled, Program, too_large
from gpipe_jax.tpu_compiler.topologies import Topology
from gpipe_jax.utils.text import GIB

SHOW_EVERY_S = 3.0
_TICK_S = 0.2  # the interval at which a time-out is checked
# Look for no TPU, do not wait for other users of libtpu, and write no log.
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
    """Compile programs for `topology`, or read their results from the cache.

    A program that does not fit is a result; its `error` says so.

    Args:
        programs: What to compile.
        topology: The slices to compile for.
        timeout_s: The longest that one program may take; None is without limit.
        show: Called every few seconds with a line of text: what compiles, and for how long.

    Returns:
        The results, in the order of the programs.

    Raises:
        ValueError: A program does not match the topology.
        CompilerNotInstalledError: The package libtpu is not installed.
        TimeoutError: A program took longer than `timeout_s`.
        RuntimeError: The compiler's process died.
    """
    for program in programs:
        _check(program, topology)
    if not programs:
        return []
    check_installed()
    keys = [cache.key_of(program, topology) for program in programs]
    results = {key: cached for key in keys if (cached := cache.load(key))}
    missing = {k: p for k, p in zip(keys, programs, strict=True) if k not in results}
    if missing:
        # `closing` ends the process at once on an interruption, not when the traceback is freed.
        with closing(_compile(list(missing.values()), topology, timeout_s, show)) as compiled:
            for key, result in zip(missing, compiled, strict=True):
                results[key] = result
                if result.error is None or result.short_by_bytes is not None:
                    cache.save(key, result)
    return [
        _limited(results[key]._replace(name=program.name), topology)
        for key, program in zip(keys, programs, strict=True)
    ]


def _limited(result: Compiled, topology: Topology) -> Compiled:
    """Mark a program as too large by our own count.

    The compiler accepts programs that need a little more than it calls usable.
    """
    usable = round(topology.generation.hbm_gib * GIB)
    if result.error is None and result.needed_bytes > usable:
        return too_large(result, usable)
    return result


def _check(program: Program, topology: Topology) -> None:
    stages, data = program.mesh_shape
    if stages * data > topology.devices:
        raise ArgumentError(
            "topology",
            f"{program.name}: a mesh of {stages} stages x {data} data replicas needs "
            f"{stages * data} devices, but {topology} has {topology.devices}; lower `stages` or "
            f"`data`, or use a larger topology",
        )
    if program.exported.nr_devices != stages * data:
        raise ValueError(
            f"{program.name}: exported for {program.exported.nr_devices} device(s), but "
            f"`mesh_shape` is {program.mesh_shape}; export it with shardings on such a mesh"
        )
    count = len(program.exported.in_avals)
    if any(not 0 <= i < count for i in program.donate):
        raise ValueError(
            f"{program.name}: `donate` {program.donate} has an index out of range; flattened, the "
            f"program has {count} arguments, so give indices of 0 to {count - 1}"
        )
    if topology.slices == 1 or stages * data == 1:
        return
    if stages % topology.slices:
        raise ArgumentError(
            "slices",
            f"{program.name}: {stages} stages do not divide by {topology.slices} slices; stages "
            f"are split over slices, so make `stages` a multiple of `slices`",
        )
    if stages * data < topology.devices:  # the compiler accepts no subset of several slices
        raise ArgumentError(
            "slices",
            f"{program.name}: a mesh of {stages} stages x {data} data replicas leaves some of the "
            f"{topology.devices} devices of {topology} idle, which several slices do not allow; "
            f"raise `stages` or `data`, or use smaller slices",
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
                target = f"{program.name} for {topology}"
                start, position = time.monotonic(), f"{i + 1} of {len(programs)}"
                due = SHOW_EVERY_S
                while (reply := _next(replies)) is None:
                    elapsed = time.monotonic() - start
                    if timeout_s is not None and elapsed > timeout_s:
                        raise TimeoutError(
                            f"compiling {target} ({position}) took longer than `timeout_s` "
                            f"{timeout_s:g} s and was stopped; raise it, or plan a smaller program"
                        )
                    if show and elapsed >= due:
                        show(f"compiling {target} ({position}), {elapsed:.0f} s")
                        due = elapsed + SHOW_EVERY_S
                if not reply.endswith(b"\n"):  # no line, or an incomplete one
                    raise RuntimeError(_death(process, target, Path(folder)))
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
    """Return the program with a flat list of arguments and one of results.

    Node types of the user (such as a NamedTuple) cannot be serialized unless they are registered,
    and need not exist in the child process.
    """
    arguments = jax.tree.structure((tuple(exported.in_avals), {}))
    return dataclasses.replace(
        exported, in_tree=arguments, out_tree=jax.tree.structure(list(exported.out_avals))
    )


@contextmanager
def _child(folder: str) -> Iterator[tuple[subprocess.Popen[bytes], "queue.Queue[bytes]"]]:
    """Start the process; yield it and its replies, a line for each program; kill it at the end."""
    with open(Path(folder) / "log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gpipe_jax.tpu_compiler.child_process", folder],
            stdin=subprocess.PIPE,  # closes with this process, which ends the child
            stdout=subprocess.PIPE,
            stderr=log,
            env=_environment(),
            start_new_session=True,  # Ctrl-C must not reach the child
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
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    variables.pop("XLA_FLAGS", None)  # they are meant for this machine's backend
    return variables


def _read(process: subprocess.Popen[bytes], replies: "queue.Queue[bytes]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        replies.put(line)
    replies.put(b"")


def _next(replies: "queue.Queue[bytes]") -> bytes | None:
    """Return the next line, b"" if there are no more, None if there is none yet."""
    try:
        return replies.get(timeout=_TICK_S)
    except queue.Empty:
        return None


def _death(process: subprocess.Popen[bytes], target: str, folder: Path) -> str:
    """Describe how the process ended, with the last lines of its log."""
    code = process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    if code == -9:
        how += ", probably because this machine ran out of memory"
    last = (folder / "log").read_text(errors="replace").strip().splitlines()[-8:]
    return "\n".join([f"the TPU compiler's process {how} while compiling {target}", *last])
