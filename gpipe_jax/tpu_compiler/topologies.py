"""Parse the names of TPU slices.

A slice is named in two ways. A topology is its shape in chips: `v3:4x4`, `v5p:4x4x8`. A Cloud
accelerator name has a size: `v3-32`, `v5litepod-16`, `v5p-128`; it counts cores in some
generations and chips in others. `parse` takes both.
"""

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from gpipe_jax.tpu_compiler.generations import ALIASES, GENERATIONS, Generation
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import did_you_mean


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
