"""TPU generations: their constants, in one table with its sources, and the names of their slices.

A slice is named in two ways. A topology says the shape in chips: `v3:4x4`, `v5p:4x4x8`. A Cloud
accelerator name says a size: `v3-32`, `v5litepod-16`, `v5p-128`; some generations count cores in
it and some count chips. `parse` takes both.
"""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpipe_jax.utils import text as hints


class Generation(NamedTuple):
    """The constants of one TPU generation. A device is what JAX calls one."""

    name: str
    cloud: str  # how Cloud accelerator names begin
    counts: str  # what the number in a Cloud name counts: "cores" (two to a chip) or "chips"
    devices_per_chip: int
    max_shape: tuple[int, ...]  # the largest slice of a real pod, in chips
    hbm_gib: float  # usable by a program, per device
    clock_ghz: float  # of the compiler's cycle estimates
    peak_flops: float  # bfloat16, per device
    hbm_bytes_s: float  # per device
    link_bytes_s: float  # one direction of one link between chips
    dcn_bytes_s: float  # between slices, per chip

    @property
    def dims(self) -> int:
        """2 or 3, the dimensions of its interconnect."""
        return len(self.max_shape)

    @property
    def cores_per_chip(self) -> int:
        """By how much the number in a Cloud name exceeds that of the chips."""
        return 2 if self.counts == "cores" else 1


# Peak FLOPs, HBM bandwidth and the largest slice are Google's, https://cloud.google.com/tpu/docs/v3
# (also /v4, /v5e, /v5p, /v6e, /tpu7x), per chip, here divided by the devices of a chip.
# usable HBM: what libtpu 0.0.42 says that it has, in the error of a program that is too large.
# clock: the peak over the operations that the compiler's estimate counts in a cycle at most, which
# is 32768 (v2), twice that (v3), 4 (v5e), 8 (v4, v5p) or 16 times (v6e, tpu7x). The estimate of a
# 4096^3 bfloat16 product is then 95 to 98 % of the peak on v2, v3, v5e and v5p, and 83 to 88 % on
# v4, v6e and tpu7x.
# links, and between slices: https://jax-ml.github.io/scaling-book/tpus/ ("ICI BW/link (one-way)",
# "DCN bandwidth"), somewhat below what Google's totals per chip give (v5e 50e9, v5p 100e9).
GENERATIONS = {
    g.name: g
    for g in (
        # Peak, HBM and links (4 of 496 Gbit/s): Jouppi et al., "A Domain-Specific Supercomputer
        # for Training Deep Neural Networks", https://doi.org/10.1145/3360307. That page gives no
        # bandwidth between slices, as Cloud has no multislice for v2 and v3: the usual one.
        Generation(
            *("v2", "v2", "cores", 2, (16, 16), 7.48),
            *(0.70, 46e12 / 2, 700e9 / 2, 62e9, 6.25e9),
        ),
        # The same paper gives links of 656 Gbit/s (82e9), less than the book. The bisection that
        # Google publishes, 6.4 TB/s over the 64 links of a 32x32 torus, agrees with the book.
        Generation(
            *("v3", "v3", "cores", 2, (32, 32), 15.48),
            *(0.94, 123e12 / 2, 900e9 / 2, 100e9, 6.25e9),
        ),
        # One device is both cores of a chip ("megacore"), as on Cloud.
        Generation(
            *("v4", "v4", "cores", 1, (16, 16, 16), 30.75),
            *(1.05, 275e12, 1200e9, 45e9, 6.25e9),
        ),
        Generation(
            *("v5e", "v5litepod", "chips", 1, (16, 16), 15.75),
            *(1.50, 197e12, 819e9, 45e9, 3.125e9),
        ),
        # A pod has 8960 chips; a job may have 6144 of them.
        Generation(
            *("v5p", "v5p", "cores", 1, (16, 16, 24), 95.74),
            *(1.75, 459e12, 2765e9, 90e9, 6.25e9),
        ),
        Generation(
            *("v6e", "v6e", "chips", 1, (16, 16), 31.25),
            *(1.75, 918e12, 1638e9, 90e9, 12.5e9),
        ),
        # 9216 chips in a pod; each of a chip's two cores is a device.
        Generation(
            *("tpu7x", "tpu7x", "cores", 2, (16, 24, 24), 94.75),
            *(2.20, 2307e12 / 2, 7380e9 / 2, 90e9, 12.5e9),
        ),
    )
}
ALIASES = {g.cloud: g for g in GENERATIONS.values()} | GENERATIONS


@dataclass(frozen=True)
class Topology:
    """One or more equal slices of one TPU generation; `shape` is in chips."""

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices together."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """How many devices JAX sees."""
        return self.chips * self.generation.devices_per_chip

    @property
    def name(self) -> str:
        """One slice, as libtpu wants it: `v3:4x4`."""
        return f"{self.generation.name}:{_times(self.shape)}"

    @property
    def label(self) -> str:
        """The Cloud accelerator name of one slice: `v3-32`."""
        size = math.prod(self.shape) * self.generation.cores_per_chip
        return f"{self.generation.cloud}-{size}"

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    def options(self) -> dict[str, Any]:
        """Keywords for `jax.experimental.topologies.get_topology_desc`."""
        found: dict[str, Any] = {"platform": "tpu", "topology_name": self.name}
        if self.slices > 1:
            found["num_slices"] = self.slices
        if math.prod(self.shape) == 1:  # otherwise libtpu takes 2x2x1 chips a host
            found["chips_per_host_bounds"] = (1, 1, 1)
        if self.generation.name == "v4":  # otherwise each core is a device of its own
            found["chip_config_name"] = "megacore"
        return found


def parse(text: str, slices: int = 1) -> Topology:
    """The topology of `v3:4x4`, `v5p:4x4x8`, ... or of `v3-32`, `v5litepod-16`, `v6e-8`, ..."""
    if slices < 1:
        raise ValueError(f"`slices` must be at least 1, got {slices}")
    match = re.fullmatch(r"\s*(\w+)([:-])([\dx]*)\s*", text)
    generation = _generation(match[1] if match else text)
    if match is None or not re.fullmatch(r"\d+(x\d+)*", match[3]):
        raise ValueError(f"can't read the accelerator {text!r}; {_examples(generation)}")
    sizes = tuple(int(n) for n in match[3].split("x"))
    if match[2] == ":":
        return Topology(generation, _checked(text, generation, sizes), slices)
    size, *others = sizes
    if others:
        raise ValueError(f"{text!r} has a shape, which follows a colon; {_examples(generation)}")
    return Topology(generation, _shape_of(text, generation, size), slices)


def _generation(name: str) -> Generation:
    name = name.strip().lower()
    if not name:
        raise ValueError(f"the accelerator is empty; {_examples(GENERATIONS['v3'])}")
    if name in ALIASES:
        return ALIASES[name]
    hint = hints.did_you_mean(re.split(r"[:-]", name)[0], ALIASES)
    raise ValueError(f"unknown TPU generation {name!r}{hint} (known: {', '.join(sorted(ALIASES))})")


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
        raise ValueError(f"{text!r} is no shape of a {name} slice: every size must be {rule}")
    # In 3-D, cubes are wired to a shape by optical switches, so that only the number counts.
    largest = generation.max_shape
    fits = (
        all(n <= most for n, most in zip(sorted(shape), largest, strict=True))
        if dims == 2
        else math.prod(shape) <= math.prod(largest)
    )
    if not fits:
        raise ValueError(
            f"{text!r} has {math.prod(shape)} chips, more than a slice of a {name} pod; the "
            f"largest is '{Topology(generation, largest)}' ({math.prod(largest)} chips); "
            f"use several slices"
        )
    return shape


def _regular(n: int, dims: int) -> bool:
    return n & (n - 1) == 0 if dims == 2 else n <= 4 or n % 4 == 0


def _shape_of(text: str, generation: Generation, size: int) -> tuple[int, ...]:
    """The shape of a Cloud name: as square or cubic as can be, which is Cloud's own default."""
    chips, rest = divmod(size, generation.cores_per_chip)
    shape = None if rest else squarest(generation, chips)
    if shape is not None:
        return shape
    most = math.prod(generation.max_shape)
    if chips > most:
        largest = Topology(generation, generation.max_shape)
        raise ValueError(
            f"{text!r} has {chips} chips, more than a slice of a {generation.name} pod; the "
            f"largest is '{largest.label}' ('{largest}', {most} chips); use several slices"
        )
    near = [
        next((n for n in numbers if squarest(generation, n)), None)
        for numbers in (range(chips, 0, -1), range(chips + 1, most + 1))
    ]
    names = [f"'{generation.cloud}-{n * generation.cores_per_chip}'" for n in near if n]
    raise ValueError(
        f"{text!r} is no size of a {generation.name} slice (the number counts "
        f"{generation.counts}); nearest: {', '.join(names)}"
    )


def squarest(generation: Generation, chips: int) -> tuple[int, ...] | None:
    """The most nearly square or cubic slice of so many chips, None if there is none."""
    if chips == 1:  # rented alone where one chip has a host of its own
        single = generation.name in ("v5e", "v6e", "tpu7x")
        return (1,) * generation.dims if single else None
    if chips < 4 or chips > math.prod(generation.max_shape):
        return None
    if chips == 4:
        return _smallest(generation)
    # Sizes are in rising order; above 32 chips, 3-D slices are made of whole 4x4x4 cubes.
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
