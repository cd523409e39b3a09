"""Test costs of networks: counted, compiled once for each network, and as limits and metrics."""

import functools
import math
import subprocess
import sys
from random import Random

import pytest

import nas
from gpipe_jax import errors as gpipe_jax_errors
from gpipe_jax.layers.numeric_settings import numeric_settings
from gpipe_jax.tpu_compiler import cache, compiler, libtpu, topologies
from gpipe_jax.tpu_compiler.generations import GENERATIONS
from gpipe_jax.tpu_compiler.results import Compiled, too_large
from gpipe_jax.utils.text import GIB
from nas import from_config
from nas.config import SearchConfig
from nas.costs import inference
from nas.costs.network_costs import NetworkCosts, _compile, _operations
from nas.storage import queries
from nas.training.network import Shape
from nas.training.static import Static

SPACE = nas.NASNetSpace(pairs=2, operations=("sep_3x3", "max_pool_3x3", "identity"))
SMALL = {"space": SPACE, "population": 4, "sample": 2, "cycles": 8, "cache": False}


@pytest.fixture
def tpu(monkeypatch):
    """Replace the TPU compiler by one that takes no time; return its requests in order."""
    asked = []

    def compile_for(network, genotype, batch: int, topology: str) -> Compiled:
        asked.append((genotype, batch, topology))
        n = len(asked)
        compiled = Compiled("a candidate", 1.0, needed_bytes=n * 2**20, cycles=1.5e6 * n)
        return compiled if n != 3 else too_large(compiled._replace(needed_bytes=17 * GIB), 16 * GIB)

    monkeypatch.setattr(libtpu, "check_installed", lambda: None)
    monkeypatch.setattr(inference, "compile_for", compile_for)
    _compile.cache_clear()
    yield asked
    _compile.cache_clear()


def genotypes(count: int) -> list:
    return [SPACE.random(Random(seed)) for seed in range(count)]


def test_parameters_are_those_of_fresh_values() -> None:
    import jax

    costs = NetworkCosts(filters=4)
    for genotype in genotypes(2):
        network = costs._network()
        assert isinstance(network, Static)
        init = functools.partial(network.init, network.encode(genotype))
        values = jax.eval_shape(init, jax.random.key(0))
        sizes = [leaf.size for leaf in jax.tree.leaves(values.parameters)]
        assert costs.params_m(genotype) == sum(sizes) / 1e6


def test_operations_grow_with_the_filters() -> None:
    _operations.cache_clear()
    genotype = genotypes(1)[0]
    small, large = (NetworkCosts(filters=n).flops_m(genotype) for n in (4, 8))
    assert 2 * small < large < 4.5 * small


def test_operations_count_convolutions_and_products() -> None:
    import jax
    from jax import lax
    from jax import numpy as jnp

    @jax.jit
    def program(images, depthwise, matrix):
        convolved = lax.conv_general_dilated(
            images, depthwise, (2, 2), "SAME", feature_group_count=3,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        more = lax.platform_dependent(convolved, cpu=lambda x: x, default=lambda x: x @ matrix)
        return more.sum((1, 2)) @ matrix

    shapes = [(2, 8, 8, 3), (5, 5, 1, 3), (3, 3)]
    specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    expected = 2 * (25 * (2 * 4 * 4 * 3) + 3 * (2 * 4 * 4 * 3) + 3 * (2 * 3))
    assert inference.count(jax.make_jaxpr(program)(*specs).jaxpr) == expected


def test_operations_are_most_of_those_that_xla_counts() -> None:
    import jax

    network, genotype = NetworkCosts(filters=8)._network(), genotypes(1)[0]
    function, specs = inference._program(network, genotype, 1)
    analysis = jax.jit(function).lower(*specs).cost_analysis()
    assert 0.7 < inference.operations(network, genotype) / analysis["flops"] < 1.1


def test_to_count_starts_no_accelerator() -> None:
    code = """if True:
        from random import Random
        import nas
        space = nas.NASNetSpace(pairs=2)
        genotype, costs = space.random(Random(0)), nas.NetworkCosts(filters=2)
        assert costs.params_m(genotype) > 0 and costs.flops_m(genotype) > 0
        from jax._src import xla_bridge
        print(xla_bridge.backends_are_initialized())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_equal_networks_are_compiled_once(tpu) -> None:
    costs = NetworkCosts(filters=4, topology="v5e:1x1", batch_size=2)
    first, other, large = genotypes(3)
    assert costs.latency_ms(first) == costs.latency_ms(first.canonical()) == 1.0  # at 1.5 GHz
    assert costs.memory_mib(first) == 1.0
    assert costs.latency_ms(other) == 2.0 and len(tpu) == 2
    assert costs.latency_ms(large) == math.inf and costs.memory_mib(large) == 17 * 2**10
    assert NetworkCosts(filters=4, topology="v5e:1x1").latency_ms(first) == 4.0  # another batch
    assert [batch for _, batch, _ in tpu] == [2, 2, 2, 1]
    assert {topology for *_, topology in tpu} == {"v5e:1x1"}


def test_compiled_program_is_inference_on_one_device(monkeypatch) -> None:
    def compile_programs(programs, topology):
        ((program,),) = [programs]
        seen.append((program.exported.in_avals[-1].shape, program.exported.platforms, topology))
        return [Compiled("a candidate", 1.0)]

    seen: list = []
    monkeypatch.setattr(compiler, "compile_programs", compile_programs)
    network = Static(Shape(cells_per_stack=1, filters=2, image=4, channels=3, classes=5))
    inference.compile_for(network, genotypes(1)[0], 7, "v3:2x2")
    assert seen == [((7, 4, 4, 3), ("tpu",), topologies.parse("v3:2x2"))]


def test_compiler_crash_costs_only_the_candidate(monkeypatch) -> None:
    def compile_programs(programs, topology):
        raise errors[0]

    errors: list[Exception] = [RuntimeError("the TPU compiler's process was killed by signal 9")]
    monkeypatch.setattr(libtpu, "check_installed", lambda: None)
    monkeypatch.setattr(compiler, "compile_programs", compile_programs)
    costs, (genotype, other) = NetworkCosts(filters=2, topology="v5e:1x1"), genotypes(2)
    with pytest.warns(RuntimeWarning, match="TPU compiler failed for a network.*killed by signal"):
        assert costs.latency_ms(genotype) == costs.memory_mib(genotype) == math.inf
    assert _compile(costs, genotype.canonical(), numeric_settings()).error == str(errors[0])
    errors[0] = gpipe_jax_errors.CompilerNotInstalledError("no libtpu")
    with pytest.raises(gpipe_jax_errors.CompilerNotInstalledError, match="no libtpu"):
        costs.latency_ms(other)


def test_latency_limit_and_memory_objective(tpu, tmp_path) -> None:
    costs = NetworkCosts(filters=4, topology="v5e:1x1")
    limits = [
        nas.Limit("memory_mib", costs.memory_mib),
        nas.Limit("latency_ms", costs.latency_ms, 6),
    ]
    result = nas.search(
        evaluate=lambda genotype: costs.memory_mib(genotype) % 5,
        folder=tmp_path,
        limits=limits,
        **SMALL,
    )
    counts = result.counts
    assert counts.results == 8 and counts.rejected >= 1
    assert all(row.metrics["latency_ms"] <= 6 for row in result.reader.ranked())
    assert list(queries.front_metrics(result.reader)) == ["memory_mib", "latency_ms"]
    front = list(queries.pareto_front(result.reader, "memory_mib"))
    assert [row.metrics["memory_mib"] for row in front] == sorted(
        (row.metrics["memory_mib"] for row in front), reverse=True
    )


def test_of_a_config(tpu) -> None:
    def limits(**given):
        values = {"space": {"kind": "nasnet"}, "evaluate": {"kind": "training"}, "limits": given}
        return from_config.arguments(SearchConfig(**values))["limits"]

    assert limits() == ()
    built = limits(params_m=1, topology="v5e:1x1", memory_mib=20, batch_size=4)
    assert [(limit.name, limit.at_most) for limit in built] == [
        ("params_m", 1), ("latency_ms", math.inf), ("memory_mib", 20)
    ]  # fmt: skip
    owner = built[0].measure.__self__
    assert owner == NetworkCosts(1, 8, 8, 1, 10, batch_size=4, topology="v5e:1x1")
    with pytest.raises(
        gpipe_jax_errors.SectionError, match="unknown TPU generation 'v5'; did you mean 'v5"
    ):
        limits(topology="v5:1x1")


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("training", {"latency_ms": 1}, "latency_ms needs a topology to compile for; add one"),
        ("function", {"params_m": 1}, "limits need evaluate.kind table or training, because"),
        ("function", {"topology": "v5e:1x1"}, "limits need evaluate.kind table or training"),
        ("table", {"topology": "v5e:1x1"}, "latency and memory are not in the table; use params_m"),
    ],
)
def test_limits_that_cannot_be(kind, given, message) -> None:
    space = "nasbench201" if kind == "table" else "nasnet"
    with pytest.raises(ValueError, match=message):
        SearchConfig(space={"kind": space}, evaluate={"kind": kind}, limits=given)


def test_what_is_missing(monkeypatch) -> None:
    with pytest.raises(ValueError, match=r"`topology` is None, but latency_ms and memory_mib"):
        NetworkCosts().latency_ms(genotypes(1)[0])
    monkeypatch.setattr(libtpu, "versions", lambda: {"libtpu": None})
    with pytest.raises(
        gpipe_jax_errors.CompilerNotInstalledError,
        match=r"needs its compiler, libtpu, .*: pip inst",
    ):
        NetworkCosts(topology="v5e:1x1")


@pytest.mark.slow
def test_by_the_real_compiler(tmp_path, monkeypatch) -> None:
    """More filters take more memory and time; the second process finds the result on disk."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'gpipe-jax[tpu]'")
    monkeypatch.setattr(cache, "folder", lambda: tmp_path)
    genotype, measured = genotypes(1)[0], []
    for filters in (4, 128):
        costs = NetworkCosts(filters=filters, topology="v5e:1x1", batch_size=256)
        measured.append((costs.latency_ms(genotype), costs.memory_mib(genotype)))
    assert (
        0.001 < measured[0][0] < measured[1][0] < 100
        and 0.1 < measured[0][1] < measured[1][1] < 2000
    )
    usable = GENERATIONS["v5e"].hbm_gib
    huge = NetworkCosts(filters=2048, image=64, topology="v5e:1x1", batch_size=2048)
    assert huge.latency_ms(genotype) == math.inf and huge.memory_mib(genotype) > usable * 1024
    _compile.cache_clear()
    monkeypatch.setattr(compiler, "_compile", lambda *_: 1 / 0)
    again = NetworkCosts(filters=128, topology="v5e:1x1", batch_size=256)
    assert again.latency_ms(genotype) == measured[1][0]


@pytest.mark.parametrize("name", ["cells_per_stack", "filters", "image", "classes", "batch_size"])
def test_sizes_are_whole_numbers(name) -> None:
    for value in (0, 2.5, "x", True):
        with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least 1, got"):
            nas.NetworkCosts(**{name: value})


def test_a_topology_is_a_text() -> None:
    with pytest.raises(ValueError, match="topology 3: expected a TPU slice such as 'v5e:1x1', or"):
        nas.NetworkCosts(topology=3)
