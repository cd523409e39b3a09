"""Parse the names of TPU slices, and check the table of their constants."""

import math

import pytest

from gpipe_jax.tpu_compiler.generations import GENERATIONS
from gpipe_jax.tpu_compiler.topologies import Topology, parse, squarest


@pytest.mark.parametrize(
    ("text", "name", "devices"),
    [
        ("v3:4x4", "v3:4x4", 32),
        ("v5p:4x4x8", "v5p:4x4x8", 128),
        ("v6e:2x2", "v6e:2x2", 4),
        ("tpu7x:2x2x1", "tpu7x:2x2x1", 8),
        ("v5litepod:4x4", "v5e:4x4", 16),
        (" V3:2x2 ", "v3:2x2", 8),
        ("v2-8", "v2:2x2", 8),
        ("v2-512", "v2:16x16", 512),
        ("v3-32", "v3:4x4", 32),
        ("v3-64", "v3:4x8", 64),
        ("v3-2048", "v3:32x32", 2048),
        ("v4-8", "v4:2x2x1", 4),
        ("v4-32", "v4:2x2x4", 16),
        ("v4-64", "v4:2x4x4", 32),
        ("v5litepod-1", "v5e:1x1", 1),
        ("v5litepod-16", "v5e:4x4", 16),
        ("v5e-8", "v5e:2x4", 8),
        ("v5p-16", "v5p:2x2x2", 8),
        ("v5p-128", "v5p:4x4x4", 64),
        ("v5p-256", "v5p:4x4x8", 128),
        ("v5p-384", "v5p:4x4x12", 192),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("v6e-8", "v6e:2x4", 8),
        ("v6e-256", "v6e:16x16", 256),
        ("tpu7x-2", "tpu7x:1x1x1", 2),
        ("tpu7x-8", "tpu7x:2x2x1", 8),
        ("tpu7x-768", "tpu7x:4x8x12", 768),
    ],
)
def test_both_kinds_of_names(text: str, name: str, devices: int) -> None:
    topology = parse(text)
    assert (topology.name, topology.devices) == (name, devices)
    assert parse(topology.label) == topology  # the shape is the one that Cloud gives


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the accelerator is empty; write a topology such as 'v3:2x2'"),
        ("v5q:2x2", "unknown TPU generation 'v5q'; did you mean 'v5p'.*known: tpu7x, v2, v3, v4"),
        ("h100-8", r"unknown TPU generation 'h100' \(known: tpu7x"),
        (
            "v3",
            "cannot read the accelerator 'v3'; write a topology such as 'v3:2x2', or a .*'v3-8'",
        ),
        ("v3:4x", "cannot read the accelerator 'v3:4x'"),
        ("v3-4x4", "'v3-4x4' has a shape, which must follow a colon"),
        ("v3:4x4x4", "'v3:4x4x4' has 3 dimensions, but v3 pods have 2"),
        ("v5p:4x4", "'v5p:4x4' has 2 dimensions, but v5p pods have 3; .*'v5p:2x2x1'"),
        ("v5e:3x5", "'v5e:3x5' does not divide into hosts of 2x2 chips"),
        ("v5e:0x0", "'v5e:0x0' does not divide into hosts"),
        ("v3:6x6", "not the shape of a v3 slice: every size must be a power of two"),
        (
            "v5p:2x2x5",
            "not the shape of a v5p slice: every size must be at most 4, or a multiple of 4",
        ),
        ("v3:64x64", r"4096 chips, more than .*the largest is 'v3:32x32' \(1024 chips\)"),
        ("v5e:4x64", "'v5e:4x64' has 256 chips, more than a slice of a v5e pod"),
        (
            "v5p:16x16x28",
            "7168 chips, more than a slice of a v5p pod; the largest is 'v5p:16x16x24",
        ),
        ("v3-4096", r"2048 chips, more than .*largest is 'v3-2048' \('v3:32x32', 1024 chips\)"),
        (
            "v3-48",
            r"not the size of a v3 slice \(the number counts cores\); nearest: 'v3-32', 'v3-64'",
        ),
        ("v3-33", "'v3-33' is not the size of a v3 slice"),
        ("v5e-2", r"\(the number counts chips\); nearest: 'v5litepod-1', 'v5litepod-4'"),
        ("v5p-100", "nearest: 'v5p-64', 'v5p-128'"),
        ("v3-2", "nearest: 'v3-8'"),
    ],
)
def test_bad_names_are_refused_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_slices() -> None:
    topology = parse("v5e:4x4", slices=2)
    assert (topology.devices, topology.chips, str(topology)) == (32, 32, "2 x v5e:4x4")
    assert topology.options()["num_slices"] == 2
    assert "num_slices" not in parse("v5e:4x4").options()
    with pytest.raises(ValueError, match="`slices` must be a whole number of at least 1, got 0"):
        parse("v5e:4x4", slices=0)


def test_options_that_libtpu_needs() -> None:
    assert parse("v4-8").options()["chip_config_name"] == "megacore"
    assert parse("v5e-1").options()["chips_per_host_bounds"] == (1, 1, 1)
    assert parse("v3-8").options() == {"platform": "tpu", "topology_name": "v3:2x2"}


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=GENERATIONS)
def test_the_table_is_consistent(generation) -> None:
    """Find a shape for each power of two up to the pod, and figures of one magnitude."""
    chips = generation.max_chips
    for power in range(2, int(math.log2(chips)) + 1):
        shape = squarest(generation, 2**power)
        assert shape is not None
        assert math.prod(shape) == 2**power
        assert parse(str(Topology(generation, shape))).shape == shape
    assert squarest(generation, chips) == generation.max_shape_chips
    # The peak is a power of two of operations a cycle.
    per_cycle = math.log2(generation.peak_flops_s / generation.clock_ghz / 1e9)
    assert per_cycle == pytest.approx(round(per_cycle), abs=0.01)
    assert 1e9 < generation.dcn_bytes_s < generation.link_bytes_s < generation.hbm_bytes_s
