"""Compile for TPU slices with the real TPU compiler, in a child process."""

import importlib.util
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gpipe_jax.tpu_compiler import cache as cache_files
from gpipe_jax.tpu_compiler import compiler, libtpu
from gpipe_jax.tpu_compiler.compiler import compile_programs
from gpipe_jax.tpu_compiler.generations import GENERATIONS
from gpipe_jax.tpu_compiler.hlo import Collective
from gpipe_jax.tpu_compiler.results import Compiled, Program, failed
from gpipe_jax.tpu_compiler.topologies import parse

TPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is not installed: pip install 'gpipe-jax[tpu]' (Linux x86-64)",
)
V3 = parse("v3:2x2")


class State(NamedTuple):
    """Hold a tree node that `jax.export` cannot serialize."""

    step: Any
    weight: Any


def export(f: Callable, *specs: Any, **options: Any) -> jax.export.Exported:
    return jax.export.export(jax.jit(f, **options), platforms=["tpu"])(*specs)


def product(size: int) -> Program:
    spec = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return Program(f"product of {size}", export(jnp.matmul, spec, spec))


def loop(trips: int, name: str = "loop") -> Program:
    def f(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ x), None), x, None, trips)[0]

    return Program(name, export(f, jax.ShapeDtypeStruct((512, 512), jnp.float32)))


def training_step(shape: tuple[int, int], donate: Sequence[int] = (0, 1)) -> Program:
    """Build a step over a mesh: a permute in a loop, and a reduction after it."""
    mesh = AbstractMesh(shape, ("stage", "data"), axis_types=(AxisType.Auto,) * 2)
    state_sharding = State(NamedSharding(mesh, P()), NamedSharding(mesh, P("stage")))
    data_sharding = NamedSharding(mesh, P("stage", "data"))

    def local(weight: jax.Array, x: jax.Array) -> jax.Array:
        ring = [(i, (i + 1) % shape[0]) for i in range(shape[0])]

        def tick(c: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jax.lax.ppermute(jnp.tanh(c @ weight[0]), "stage", ring), None

        y = jax.lax.scan(tick, x[0], None, 6)[0]
        return jax.lax.psum(y.T @ y, "data")[None]

    def step(state: State, x: jax.Array) -> State:
        specs = (P("stage"), P("stage", "data"))
        update = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=P("stage"), check_vma=False
        )
        return State(state.step + 1, state.weight - update(state.weight, x))

    state = State(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=state_sharding.step),
        jax.ShapeDtypeStruct((shape[0], 256, 256), jnp.float32, sharding=state_sharding.weight),
    )
    x = jax.ShapeDtypeStruct((shape[0], 64, 256), jnp.float32, sharding=data_sharding)
    exported = export(
        step,
        state,
        x,
        in_shardings=(state_sharding, data_sharding),
        out_shardings=state_sharding,
        donate_argnums=0,
    )
    return Program("step", exported, tuple(donate), shape)


def too_large() -> Program:
    spec = jax.ShapeDtypeStruct((1 << 15, 1 << 14, 16), jnp.float32)
    return Program("too large", export(lambda x: (x + 1).sum(), spec))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Use a folder of results for this module instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield cache_files.folder()


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Make the cache unwritable: its folder is below a file. Use an empty folder for the rest."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen]:
    """Record all processes that are started."""
    processes: list[subprocess.Popen] = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return processes


def replace_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    """Run a shell script in place of the compiler's process."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(compiler.sys, "executable", str(path))
    monkeypatch.setattr(compiler, "check_installed", lambda: None)


@pytest.fixture(scope="module")
def compiled(cache: Path) -> dict[str, Compiled]:
    """Compile all programs for v3, in one process."""
    programs = [
        product(4096),
        loop(3),
        loop(12)._replace(name="longer loop"),
        training_step((4, 2)),
        training_step((4, 2), donate=())._replace(name="not donated"),
        training_step((2, 2))._replace(name="fewer devices"),
        too_large(),
    ]
    return {result.name: result for result in compile_programs(programs, V3)}


def peak_fraction(result: Compiled, name: str, size: int) -> float:
    """Return the fraction of peak FLOP/s that a product reaches in its estimated cycles."""
    generation = GENERATIONS[name]
    seconds = result.cycles / (generation.clock_ghz * 1e9)
    return 2 * size**3 / seconds / generation.peak_flops_s


@TPU
@pytest.mark.parametrize("topology", ["v2:2x2", "v5e:2x2", "v5p:2x2x1"])
def test_a_large_product_reaches_the_peak(cache: Path, topology: str) -> None:
    result = compile_programs([product(4096)], parse(topology))[0]
    assert peak_fraction(result, topology.split(":")[0], 4096) == pytest.approx(1, abs=0.06)
    assert result.argument_bytes == 2 * 2 * 4096**2
    assert result.fits


@TPU
def test_v3_in_one_process(compiled: dict[str, Compiled]) -> None:
    assert peak_fraction(compiled["product of 4096"], "v3", 4096) == pytest.approx(1, abs=0.06)
    assert all(result.compile_s > 0 for result in compiled.values())


@TPU
def test_cycles_are_proportional_to_a_loops_iterations(compiled: dict[str, Compiled]) -> None:
    ratio = compiled["longer loop"].cycles / compiled["loop"].cycles
    assert ratio == pytest.approx(4, rel=0.1)  # what is before the loop is done once


@TPU
def test_donated_arguments_are_aliased(compiled: dict[str, Compiled]) -> None:
    """Alias the weights of a stage, replicated over data, and the step."""
    donated, copied = compiled["step"], compiled["not donated"]
    assert copied.alias_bytes == 0
    assert donated.alias_bytes >= 256 * 256 * 4
    assert donated.alias_bytes == pytest.approx(donated.output_bytes, rel=0.01)
    total = donated.argument_bytes + donated.output_bytes - donated.alias_bytes
    assert donated.needed_bytes == total + donated.temporary_bytes + donated.code_bytes


@TPU
def test_collectives_of_a_sharded_step(compiled: dict[str, Compiled]) -> None:
    """Find synchronous permutes on v3. They send bfloat16, the input type of the product."""
    collectives = {c.kind: c for c in compiled["step"].collectives}
    assert collectives == {
        "collective-permute": Collective("collective-permute", 32 * 256 * 2, False, True, 6),
        "all-reduce": Collective("all-reduce", 256 * 256 * 4, False, False, 1),
    }
    assert compiled["fewer devices"].fits


@TPU
def test_what_does_not_fit_is_a_result(compiled: dict[str, Compiled]) -> None:
    result = compiled["too large"]
    assert not result.fits
    assert result.needed_bytes == 32 * 2**30
    assert result.usable_bytes == pytest.approx(GENERATIONS["v3"].hbm_gib * 2**30, rel=1e-6)
    assert result.short_by_bytes == result.needed_bytes - result.usable_bytes
    assert result.error == "does not fit by 16.52 GiB"


@TPU
@pytest.mark.parametrize(("over", "fits"), [(0, True), (1, False)])
def test_our_own_count_decides(cache: Path, over: int, fits: bool) -> None:
    """Refuse what the TPU compiler accepts: slightly more than it calls usable."""
    usable = round(GENERATIONS["v3"].hbm_gib * 2**30)
    program = product(1024 + over)
    known = Compiled("known", 1.0, needed_bytes=usable + over, cycles=5.0)
    cache_files.save(cache_files.key_of(program, V3), known)
    result = compile_programs([program], V3)[0]
    assert result.fits is fits and result.cycles == 5.0
    assert (result.short_by_bytes or 0) == over


@TPU
def test_several_slices(cache: Path) -> None:
    """Split stages over slices: permutes cross them, the reduction does not."""
    result = compile_programs([training_step((4, 2))], parse("v5e:2x2", slices=2))[0]
    assert result.error is None
    assert {c.kind: c.times for c in result.collectives}["collective-permute"] == 6


@TPU
def test_a_subset_of_a_slice(cache: Path) -> None:
    """Use the first devices: libtpu refuses the reduction on some four of the sixteen."""
    result = compile_programs([training_step((1, 4))], parse("v5e:4x4"))[0]
    assert result.error is None and result.collectives


@TPU
def test_results_are_cached(
    compiled: dict[str, Compiled], cache: Path, started: list[subprocess.Popen]
) -> None:
    again = compile_programs([loop(3, name="another name")], V3)[0]
    assert started == []
    assert again == compiled["loop"]._replace(name="another name")


@TPU
def test_a_damaged_result_is_compiled_again(
    compiled: dict[str, Compiled], cache: Path, started: list[subprocess.Popen]
) -> None:
    path = cache / f"{cache_files.key_of(loop(3), V3)}.json"
    whole = json.loads(path.read_text())
    changed = json.dumps({**whole, "collectives": 3})
    for damaged in ("", '{"name": 1}', "[]", "[" * 100_000, changed):
        path.write_text(damaged)
        assert cache_files.load(path.stem) is None
    again = compile_programs([loop(3)], V3)[0]
    assert len(started) == 1
    assert again.cycles == compiled["loop"].cycles
    assert Compiled.from_dict(json.loads(path.read_text())) == again
    assert not list(cache.glob("*.tmp"))


@TPU
def test_an_unwritable_cache_is_no_error(no_cache: None, tmp_path: Path) -> None:
    """Leave nothing behind either, in the environment or on disk."""
    before = dict(os.environ)
    result = compile_programs([loop(2), loop(2, "same")], V3)
    assert [r.name for r in result] == ["loop", "same"]
    assert result[0].cycles == result[1].cycles > 0
    assert dict(os.environ) == before
    assert not list((tmp_path / "temporary").iterdir())


@TPU
def test_other_failures_are_reported_and_not_cached(cache: Path) -> None:
    spec = jax.ShapeDtypeStruct((8,), jnp.float32)
    program = Program("for CPU", jax.export.export(jax.jit(jnp.sin), platforms=["cpu"])(spec))
    result = compile_programs([program], V3)[0]
    assert not result.fits
    assert "exported for platforms" in (result.error or "")
    assert result.short_by_bytes is None
    assert cache_files.load(cache_files.key_of(program, V3)) is None


def test_a_time_out_ends_the_process(
    no_cache: None,
    started: list[subprocess.Popen],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    replace_compiler(monkeypatch, tmp_path, "exec sleep 600")
    monkeypatch.setattr(compiler, "SHOW_EVERY_S", 0.3)
    shown: list[str] = []
    with pytest.raises(
        TimeoutError,
        match=r"loop for v3:2x2 \(1 of 1\) took longer than `timeout_s` 1 s .*; raise it, or",
    ):
        compile_programs([loop(2)], V3, timeout_s=1, show=shown.append)
    assert [process.returncode for process in started] == [-9]
    assert shown
    assert shown[0] == "compiling loop for v3:2x2 (1 of 1), 0 s"
    assert not list((tmp_path / "temporary").iterdir())


def test_an_interruption_ends_the_process(
    no_cache: None,
    started: list[subprocess.Popen],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    replace_compiler(monkeypatch, tmp_path, "exec sleep 600")
    monkeypatch.setattr(compiler, "SHOW_EVERY_S", 0.3)

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_programs([loop(2)], V3, show=interrupt)
    assert [process.returncode for process in started] == [-9]
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo a reason >&2; exit 3", r"(?s)ended with exit code 3 while compiling loop.*a reason"),
        ("printf '{\\\"name\\\"'; exit 4", "ended with exit code 4"),
        ("kill -9 $$", "was killed by signal 9, probably because this machine ran out of memory"),
    ],
)
def test_a_process_that_dies(
    no_cache: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str
) -> None:
    replace_compiler(monkeypatch, tmp_path, script)
    with pytest.raises(RuntimeError, match=message):
        compile_programs([loop(2)], V3)


@pytest.mark.parametrize(
    ("text", "needed", "usable"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 17.25G of 15.48G hbm. Exceeded hbm capacity by 1.77G.\n\nTotal hbm",
            17.25,
            15.48,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (15.88G) exceeds available HBM (15.48G).",
            15.88,
            15.48,
        ),
        ("Used 15900.5M of 15.25G hbm.", 15900.5 / 1024, 15.25),
    ],
)
def test_both_phrases_for_out_of_memory(text: str, needed: float, usable: float) -> None:
    result = failed("p", 1.0, text)
    assert result.needed_bytes == pytest.approx(needed * 2**30)
    assert result.usable_bytes == pytest.approx(usable * 2**30)
    assert result.short_by_bytes == pytest.approx((needed - usable) * 2**30)


def test_any_other_error_is_its_first_line() -> None:
    result = failed("p", 1.0, "\n\n  INTERNAL: something\nmore\n")
    assert (result.error, result.short_by_bytes) == ("INTERNAL: something", None)
    assert failed("p", 1.0, "").error == "no message"


def test_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    program = loop(2)
    key = cache_files.key_of(program, V3)
    # The same program, written at another place in this file.

    def f(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ x), None), x, None, 2)[0]

    moved = Program("moved", export(f, jax.ShapeDtypeStruct((512, 512), jnp.float32)))
    assert moved.exported.mlir_module() != program.exported.mlir_module()
    assert cache_files.key_of(moved, V3) == key
    others = [
        cache_files.key_of(loop(3), V3),
        cache_files.key_of(program._replace(donate=(0,)), V3),
        cache_files.key_of(program, parse("v3:2x4")),
        cache_files.key_of(program, parse("v3:2x2", slices=2)),
    ]
    for variable in ("LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL", "JAX_MEMORY_FITTING_LEVEL"):
        monkeypatch.setenv(variable, "1")
        others.append(cache_files.key_of(program, V3))
        monkeypatch.delenv(variable)
    monkeypatch.setattr(cache_files, "versions", lambda: {"jax": "1", "libtpu_pinned": None})
    others.append(cache_files.key_of(program, V3))
    assert len({key, *others}) == 9


@pytest.mark.parametrize(
    ("shape", "topology", "message"),
    [
        ((4, 4), V3, "16 devices, but v3:2x2 has 8; lower `stages` or `data`, or use a larger"),
        ((4, 1), V3, r"exported for 1 device\(s\), but `mesh_shape` is \(4, 1\)"),
    ],
)
def test_a_mesh_that_does_not_fit(shape: tuple[int, int], topology, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compile_programs([loop(2)._replace(mesh_shape=shape)], topology)


def test_donated_arguments_exist() -> None:
    with pytest.raises(
        ValueError, match=r"`donate` \(0, 1\) has an index out of range; .* has 1 arguments"
    ):
        compile_programs([loop(2)._replace(donate=(0, 1))], V3)


def test_several_slices_are_used_whole() -> None:
    with pytest.raises(ValueError, match="3 stages do not divide by 2 slices"):
        compile_programs([training_step((3, 2))], parse("v5e:2x2", slices=2))
    with pytest.raises(ValueError, match="leaves some of the 8 devices of 2 x v5e:2x2 idle"):
        compile_programs([training_step((2, 2))], parse("v5e:2x2", slices=2))


def test_nothing_to_compile(started: list[subprocess.Popen]) -> None:
    assert compile_programs([], V3) == []
    assert started == []


def installed(monkeypatch: pytest.MonkeyPatch, version: str | None, pinned: str | None) -> None:
    known = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": version, "libtpu_pinned": pinned}
    monkeypatch.setattr(libtpu, "versions", lambda: known)


def test_without_the_tpu_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, None, "0.0.42.*")
    assert libtpu.version_warning() is None
    with pytest.raises(
        RuntimeError, match=r"libtpu, which is not .*pip install 'gpipe-jax\[tpu\]'"
    ):
        compile_programs([loop(2)], V3)


@pytest.mark.parametrize(
    ("version", "pinned", "warns"),
    [
        ("0.0.42.1", "0.0.42.*", False),
        ("0.0.42", "0.0.42", False),
        ("0.0.42", "0.0.42.*", False),
        ("0.0.421", "0.0.42.*", True),
        ("0.0.50", "0.0.42.*", True),
        ("0.0.50", None, False),
    ],
)
def test_another_libtpu_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, version: str, pinned: str | None, warns: bool
) -> None:
    installed(monkeypatch, version, pinned)
    warning = libtpu.version_warning()
    assert (warning is not None) is warns
    assert not warns or f"libtpu {version} is installed, but jax 0.10.2 pins libtpu" in str(warning)


def test_versions_are_those_installed() -> None:
    known = libtpu.versions()
    assert known["jax"] == jax.__version__
    assert known["libtpu_pinned"]
