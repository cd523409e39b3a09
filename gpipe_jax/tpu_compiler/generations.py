"""List the TPU generations with their constants and the sources of these.

A new generation is a row of the table; nothing else changes.
"""

import math
from typing import NamedTuple


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
