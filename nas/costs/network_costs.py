"""Measure what a candidate's network costs before it is trained; JAX is imported on use."""

import functools
import math
import warnings
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from gpipe_jax.errors import ArgumentError
from gpipe_jax.genotypes.genotype import Genotype
from gpipe_jax.utils.checks import check_counts
from gpipe_jax.utils.text import did_you_mean_or_list
from nas.choices import DTYPES
from nas.keywords import suggesting
from nas.storage import old_names

if TYPE_CHECKING:
    from gpipe_jax.tpu_compiler.results import Compiled
    from nas.training.static import Static


_COUNTS = ("cells_per_stack", "filters", "image", "channels", "classes", "batch_size")


@suggesting(renamed=old_names.FIELDS["NetworkCosts"])
@dataclass(frozen=True)
class NetworkCosts:
    """Measure the costs of networks of one size, as functions of a genotype.

    `params_m` and `flops_m` are the same on every platform, and start no accelerator. `latency_ms`
    and `memory_mib` are estimates of the TPU compiler, without a TPU. They take seconds to minutes,
    once for each network: equal genotypes share a canonical form, and results are cached on disk.

    Limits are measured before a candidate is handed out: as many candidates at once as there are
    workers, or cores of this machine if these are fewer.

    Args:
        cells_per_stack: Normal cells in each of the three stacks (N). Default: 1.
        filters: Filters of the first stack (F). Default: 8.
        image: Pixels of an image each way. Default: 8.
        channels: Channels of an image. Default: 1.
        classes: Number of classes. Default: 10.
        dtype: "float32" or "bfloat16", for the computation. Default: "float32".
        batch_size: Images in a batch at inference, for `latency_ms` and `memory_mib`. Default: 1.
        topology: TPU slice such as "v5e:1x1" or "v5litepod-4", of which one device is used.
            `latency_ms` and `memory_mib` need it. Default: none.

    Raises:
        ValueError: `dtype` or `topology` is unknown, or a number is no whole number of at least 1.
        CompilerNotInstalledError: `topology` is given and the TPU compiler is not installed.

    Example::

        costs = nas.NetworkCosts(
            cells_per_stack=3, filters=24, image=32, channels=3, topology="v5e:1x1"
        )
        limits = [
            nas.Limit("params_m", costs.params_m, 3.2),
            nas.Limit("latency_ms", costs.latency_ms),  # recorded, without a limit
        ]
        nas.search(space=nas.NASNetSpace(), evaluate=evaluate, limits=limits)
    """

    cells_per_stack: int = 1
    filters: int = 8
    image: int = 8
    channels: int = 1
    classes: int = 10
    dtype: str = "float32"
    batch_size: int = 1
    topology: str | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; runs of versions before 0.2 have other names of fields."""
        own = [each.name for each in fields(self)]
        vars(self).update(old_names.current_fields("NetworkCosts", state, own))

    def __post_init__(self) -> None:
        check_counts(**{name: getattr(self, name) for name in _COUNTS})
        if self.dtype not in DTYPES:
            suggestion = did_you_mean_or_list(self.dtype, DTYPES)
            raise ArgumentError("dtype", f"dtype: unknown {self.dtype!r}{suggestion}")
        if self.topology is None:
            return
        if not isinstance(self.topology, str):
            raise ArgumentError(
                "topology",
                f"topology {self.topology!r}: expected a TPU slice such as 'v5e:1x1', or None",
            )
        from gpipe_jax.tpu_compiler import libtpu, topologies

        topologies.parse(self.topology)
        libtpu.check_installed()

    def params_m(self, genotype: Genotype) -> float:
        """Count the parameters; this takes about a second for a new network.

        Args:
            genotype: The genotype of the network's cells.

        Returns:
            Millions of parameters.
        """
        return _parameters(self, genotype.canonical()) / 1e6

    def flops_m(self, genotype: Genotype) -> float:
        """Count the floating-point operations for one image; this takes seconds.

        Those of convolutions and matrix products count. A multiplication and an addition are two.

        Args:
            genotype: The genotype of the network's cells.

        Returns:
            Millions of operations.
        """
        return _operations(self, genotype.canonical()) / 1e6

    def latency_ms(self, genotype: Genotype) -> float:
        """Estimate the time of a batch at inference: the compiler's cycles over the clock.

        Args:
            genotype: The genotype of the network's cells.

        Returns:
            Milliseconds; infinite if the network does not fit into the device's memory.

        Raises:
            ValueError: `topology` is None.
        """
        from gpipe_jax.tpu_compiler import topologies

        compiled = self._compiled(genotype)
        if not compiled.fits:
            return math.inf
        clock_hz = topologies.parse(self.topology or "").generation.clock_ghz * 1e9
        return 1e3 * compiled.cycles / clock_hz

    def memory_mib(self, genotype: Genotype) -> float:
        """Estimate the memory of the program at inference.

        Args:
            genotype: The genotype of the network's cells.

        Returns:
            MiB; infinite if the compiler gives no number.

        Raises:
            ValueError: `topology` is None.
        """
        compiled = self._compiled(genotype)
        return compiled.needed_bytes / 2**20 if compiled.needed_bytes else math.inf

    def _compiled(self, genotype: Genotype) -> "Compiled":
        if self.topology is None:
            raise ValueError(
                "`topology` is None, but latency_ms and memory_mib are costs on a TPU; give a "
                "slice such as topology='v5e:1x1'"
            )
        from gpipe_jax.layers.numeric_settings import numeric_settings

        compiled = _compile(self, genotype.canonical(), numeric_settings())
        if compiled.error is not None and compiled.short_by_bytes is None:
            warnings.warn(
                "the TPU compiler failed for a network, which counts as too slow and too large: "
                f"{compiled.error}",
                RuntimeWarning,
                stacklevel=3,
            )
        return compiled

    def _network(self) -> "Static":
        from nas.training.network import Shape
        from nas.training.static import Static

        shape = Shape(
            self.cells_per_stack,
            self.filters,
            self.image,
            self.channels,
            self.classes,
            dtype=self.dtype,
        )
        return Static(shape)


@functools.lru_cache(maxsize=100_000)
def _parameters(costs: NetworkCosts, genotype: Genotype) -> int:
    from nas.costs import inference

    return inference.parameters(costs._network(), genotype)


@functools.lru_cache(maxsize=100_000)
def _operations(costs: NetworkCosts, genotype: Genotype) -> int:
    from nas.costs import inference

    return inference.operations(costs._network(), genotype)


@functools.lru_cache(maxsize=100_000)
def _compile(costs: NetworkCosts, genotype: Genotype, settings: tuple) -> "Compiled":
    del settings  # a part of the key: a program has the precision of its own
    from nas.costs import inference

    network = costs._network()
    return inference.compile_for(network, genotype, costs.batch_size, costs.topology or "")
