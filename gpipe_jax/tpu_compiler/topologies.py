"""List the TPU generations with their constants and sources, and parse the names of their slices.

A slice is named in two ways. A topology is its shape in chips: `v3:4x4`, `v5p:4x4x8`. A Cloud
accelerator name has a size: `v3-32`, `v5litepod-16`, `v5p-128`; it counts cores in some
generations and chips in others. `parse` takes both. A new generation is a row of `GENERATIONS`;
nothing else changes.
"""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import did_you_mean


class Generation(NamedTuple):
    """Hold the constants of one TPU generation. A device is what JAX calls one."""

    name: str
    cloud_name: str  # the first part of Cloud accelerator names
    cloud_counts: str  # the unit of the number in a Cloud name: "cores" (two a chip) or "chips"
    devices_per_chip: int
    single_chips: bool  # whether Cloud rents one chip alone, as a host of its own
    chip_config: str | None  # a mode of the chip that libtpu must be given
    max_shape_chips: tuple[int, ...]  # the largest slice of a real pod
    hbm_gib: float  # usable by a program, per device
    clock_ghz: float  # of the compiler's cycle estimates
    chip_flops_s: float  # peak of bfloat16, per chip
    chip_hbm_bytes_s: float  # per chip
    link_bytes_s: float  # one direction of one link between chips
    dcn_bytes_s: float  # between slices (data-centre network), per chip

    @property
    def peak_flops_s(self) -> float:
        """Return the peak of bfloat16, per device."""
        return self.chip_flops_s / self.devices_per_chip

    @property
    def hbm_bytes_s(self) -> float:
        """Return the bandwidth of HBM, per device."""
        return self.chip_hbm_bytes_s / self.devices_per_chip

    @property
    def dims(self) -> int:
        """Return the dimensions of its interconnect, 2 or 3."""
        return len(self.max_shape_chips)

    @property
    def max_chips(self) -> int:
        """Return the chips of the largest slice."""
        return math.prod(self.max_shape_chips)

    @property
    def cloud_units_per_chip(self) -> int:
        """Return the ratio of the number in a Cloud name to the number of chips."""
        return 2 if self.cloud_counts == "cores" else 1


# chip_flops_s, chip_hbm_bytes_s, max_shape_chips: Google, https://cloud.google.com/tpu/docs/v3
#   (also /v4, /v5e, /v5p, /v6e, /tpu7x).
# hbm_gib: what libtpu 0.0.42 says that it has, in the error of a program that is too large.
# clock_ghz: the peak over the most operations that the compiler's estimate counts in a cycle. That
#   is 32768 (v2), twice that (v3), 4 (v5e), 8 (v4, v5p) or 16 times (v6e, tpu7x). The estimate of a
#   4096^3 bfloat16 product is then 95 to 98 % of the peak on v2, v3, v5e and v5p, and 83 to 88 % on
#   v4, v6e and tpu7x.
# link_bytes_s, dcn_bytes_s: https://jax-ml.github.io/scaling-book/tpus/ ("ICI BW/link (one-way)",
#   "DCN bandwidth"), somewhat below what Google's totals per chip give (v5e 50e9, v5p 100e9).
_TABLE = (
    # Peak, HBM and links (4 of 496 Gbit/s): Jouppi et al., "A Domain-Specific Supercomputer for
    # Training Deep Neural Networks", https://doi.org/10.1145/3360307. The page of scaling-book has
    # no bandwidth between slices, as Cloud has no multislice for v2 and v3: the usual one.
    Generation(
        name="v2",
        cloud_name="v2",
        cloud_counts="cores",
        devices_per_chip=2,
        single_chips=False,
        chip_config=None,
        max_shape_chips=(16, 16),
        hbm_gib=7.48,
        clock_ghz=0.70,
        chip_flops_s=46e12,
        chip_hbm_bytes_s=700e9,
        link_bytes_s=62e9,
        dcn_bytes_s=6.25e9,
    ),
    # The same paper gives links of 656 Gbit/s (82e9), less than the book. The bisection that
    # Google publishes, 6.4 TB/s over the 64 links of a 32x32 torus, agrees with the book.
    Generation(
        name="v3",
        cloud_name="v3",
        cloud_counts="cores",
        devices_per_chip=2,
        single_chips=False,
        chip_config=None,
        max_shape_chips=(32, 32),
        hbm_gib=15.48,
        clock_ghz=0.94,
        chip_flops_s=123e12,
        chip_hbm_bytes_s=900e9,
        link_bytes_s=100e9,
        dcn_bytes_s=6.25e9,
    ),
    # One device is both cores of a chip ("megacore"), as on Cloud; without that mode libtpu makes
    # each core a device.
    Generation(
        name="v4",
        cloud_name="v4",
        cloud_counts="cores",
        devices_per_chip=1,
        single_chips=False,
        chip_config="megacore",
        max_shape_chips=(16, 16, 16),
        hbm_gib=30.75,
        clock_ghz=1.05,
        chip_flops_s=275e12,
        chip_hbm_bytes_s=1200e9,
        link_bytes_s=45e9,
        dcn_bytes_s=6.25e9,
    ),
    Generation(
        name="v5e",
        cloud_name="v5litepod",
        cloud_counts="chips",
        devices_per_chip=1,
        single_chips=True,
        chip_config=None,
        max_shape_chips=(16, 16),
        hbm_gib=15.75,
        clock_ghz=1.50,
        chip_flops_s=197e12,
        chip_hbm_bytes_s=819e9,
        link_bytes_s=45e9,
        dcn_bytes_s=3.125e9,
    ),
    # A pod has 8960 chips; a job may have 6144 of them.
    Generation(
        name="v5p",
        cloud_name="v5p",
        cloud_counts="cores",
        devices_per_chip=1,
        single_chips=False,
        chip_config=None,
        max_shape_chips=(16, 16, 24),
        hbm_gib=95.74,
        clock_ghz=1.75,
        chip_flops_s=459e12,
        chip_hbm_bytes_s=2765e9,
        link_bytes_s=90e9,
        dcn_bytes_s=6.25e9,
    ),
    Generation(
        name="v6e",
        cloud_name="v6e",
        cloud_counts="chips",
        devices_per_chip=1,
        single_chips=True,
        chip_config=None,
        max_shape_chips=(16, 16),
        hbm_gib=31.25,
        clock_ghz=1.75,
        chip_flops_s=918e12,
        chip_hbm_bytes_s=1638e9,
        link_bytes_s=90e9,
        dcn_bytes_s=12.5e9,
    ),
    # 9216 chips in a pod; each of a chip's two cores is a device.
    Generation(
        name="tpu7x",
        cloud_name="tpu7x",
        cloud_counts="cores",
        devices_per_chip=2,
        single_chips=True,
        chip_config=None,
        max_shape_chips=(16, 24, 24),
        hbm_gib=94.75,
        clock_ghz=2.20,
        chip_flops_s=2307e12,
        chip_hbm_bytes_s=7380e9,
        link_bytes_s=90e9,
        dcn_bytes_s=12.5e9,
    ),
)
GENERATIONS = {generation.name: generation for generation in _TABLE}
ALIASES = {generation.cloud_name: generation for generation in _TABLE} | GENERATIONS


@dataclass(frozen=True)
class Topology:
    """Hold one or more equal slices of one TPU generation; `shape` is in chips."""

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Return the chips of all slices together."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Return the number of devices that JAX sees."""
        return self.chips * self.generation.devices_per_chip

    @property
    def name(self) -> str:
        """Return the name of one slice in libtpu: `v3:4x4`."""
        return f"{self.generation.name}:{_times(self.shape)}"

    @property
    def label(self) -> str:
        """Return the Cloud accelerator name of one slice: `v3-32`."""
        size = math.prod(self.shape) * self.generation.cloud_units_per_chip
        return f"{self.generation.cloud_name}-{size}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    def options(self) -> dict[str, Any]:
        """Return the keywords for `jax.experimental.topologies.get_topology_desc`."""
        options: dict[str, Any] = {"platform": "tpu", "topology_name": self.name}
        if self.slices > 1:
            options["num_slices"] = self.slices
        if math.prod(self.shape) == 1:  # otherwise libtpu takes 2x2x1 chips a host
            options["chips_per_host_bounds"] = (1, 1, 1)
        if self.generation.chip_config is not None:
            options["chip_config_name"] = self.generation.chip_config
        return options


def parse(text: str, slices: int = 1) -> Topology:
    """Return the topology of a name: `v3:4x4`, `v5p:4x4x8`, `v3-32`, `v5litepod-16`, `v6e-8`.

    Raises ValueError if there is no such slice; the message names the nearest ones.
    """
    check_count("slices", slices)
    match = re.fullmatch(r"\s*(\w+)([:-])([\dx]*)\s*", text)
    generation = _generation(match[1] if match else text)
    if match is None or not re.fullmatch(r"\d+(x\d+)*", match[3]):
        raise ValueError(f"cannot read the accelerator {text!r}; {_examples(generation)}")
    sizes = tuple(int(n) for n in match[3].split("x"))
    if match[2] == ":":
        return Topology(generation, _checked(text, generation, sizes), slices)
    size, *others = sizes
    if others:
        raise ValueError(
            f"{text!r} has a shape, which must follow a colon; {_examples(generation)}"
        )
    return Topology(generation, _cloud_shape(text, generation, size), slices)


def _generation(name: str) -> Generation:
    name = name.strip().lower()
    if not name:
        raise ValueError(f"the accelerator is empty; {_examples(GENERATIONS['v3'])}")
    if name in ALIASES:
        return ALIASES[name]
    suggestion = did_you_mean(re.split(r"[:-]", name)[0], ALIASES)
    known = ", ".join(sorted(ALIASES))
    raise ValueError(f"unknown TPU generation {name!r}{suggestion} (known: {known})")


def _examples(generation: Generation) -> str:
    small = Topology(generation, _smallest(generation))
    return f"write a topology such as '{small}', or a Cloud name such as '{small.label}'"


def _smallest(generation: Generation) -> tuple[int, ...]:
    return (2, 2) if generation.dims == 2 else (2, 2, 1)


def _checked(text: str, generation: Generation, shape: tuple[int, ...]) -> tuple[int, ...]:
    name, dims = generation.name, generation.dims
    if len(shape) != dims:
        raise ValueError(
            f"{text!r} has {len(shape)} dimensions, but {name} pods have {dims}; "
            f"{_examples(generation)}"
        )
    if 0 in shape or (math.prod(shape) > 1 and (shape[0] % 2 or shape[1] % 2)):
        raise ValueError(
            f"{text!r} does not divide into hosts of 2x2 chips; make the first two sizes even"
        )
    if any(not _regular(n, dims) for n in shape):
        rule = "a power of two" if dims == 2 else "at most 4, or a multiple of 4"
        raise ValueError(f"{text!r} is not the shape of a {name} slice: every size must be {rule}")
    # In 3-D, cubes are wired to a shape by optical switches, so that only the number counts.
    largest, chips = generation.max_shape_chips, math.prod(shape)
    if dims == 2:
        fits = all(n <= most for n, most in zip(sorted(shape), largest, strict=True))
    else:
        fits = chips <= generation.max_chips
    if not fits:
        raise ValueError(
            f"{text!r} has {chips} chips, more than a slice of a {name} pod; the largest is "
            f"'{Topology(generation, largest)}' ({generation.max_chips} chips); use several slices"
        )
    return shape


def _regular(n: int, dims: int) -> bool:
    """Check one size of a shape, in chips."""
    return n & (n - 1) == 0 if dims == 2 else n <= 4 or n % 4 == 0


def _cloud_shape(text: str, generation: Generation, size: int) -> tuple[int, ...]:
    """Return the shape of a Cloud name: as square or cubic as possible, as Cloud's default is."""
    chips, remainder = divmod(size, generation.cloud_units_per_chip)
    shape = None if remainder else squarest(generation, chips)
    if shape is not None:
        return shape
    most = generation.max_chips
    if chips > most:
        largest = Topology(generation, generation.max_shape_chips)
        raise ValueError(
            f"{text!r} has {chips} chips, more than a slice of a {generation.name} pod; the "
            f"largest is '{largest.label}' ('{largest}', {most} chips); use several slices"
        )
    below = next((n for n in range(chips, 0, -1) if squarest(generation, n)), None)
    above = next((n for n in range(chips + 1, most + 1) if squarest(generation, n)), None)
    nearest = [n * generation.cloud_units_per_chip for n in (below, above) if n]
    names = ", ".join(f"'{generation.cloud_name}-{n}'" for n in nearest)
    raise ValueError(
        f"{text!r} is not the size of a {generation.name} slice (the number counts "
        f"{generation.cloud_counts}); nearest: {names}"
    )


def squarest(generation: Generation, chips: int) -> tuple[int, ...] | None:
    """Return the shape of a slice of `chips` chips nearest to a square or cube, if there is one."""
    if chips == 1:
        return (1,) * generation.dims if generation.single_chips else None
    if chips < 4 or chips > generation.max_chips:
        return None
    if chips == 4:
        return _smallest(generation)
    # Sizes rise along a shape. Above 32 chips, 3-D slices consist of whole 4x4x4 cubes.
    step = 4 if generation.dims == 3 and chips > 32 else 2
    sizes = [n for n in range(step, chips, step) if chips % n == 0 and _regular(n, generation.dims)]
    shapes = [
        (*rest, chips // math.prod(rest))
        for rest in itertools.combinations_with_replacement(sizes, generation.dims - 1)
        if chips // math.prod(rest) in sizes and chips % math.prod(rest) == 0
    ]
    return min((s for s in shapes if s[-1] >= s[-2]), key=sum, default=None)


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)
