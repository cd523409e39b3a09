"""What a candidate's network costs, known before it is trained. JAX is loaded when it is used.

As hard limits, or to be recorded only, for the report's Pareto fronts:

    costs = nas.NetworkCosts(cells_per_stack=3, filters=24, image=32, channels=3, topology="v5e:1x1")
    nas.search(space=nas.NASNetSpace(), limits=[
        nas.Limit("params_m", costs.params_m, 3.2),
        nas.Limit("latency_ms", costs.latency_ms),  # recorded, whatever it is
    ], ...)
"""

import functools
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpipe_jax.genotypes.genotype import Genotype
from nas.storage import old_names
from nas.training.options import DTYPES

if TYPE_CHECKING:
    from gpipe_jax.tpu_compiler.results import Compiled
    from nas.training.static import Static

COMPILED = ("latency_ms", "memory_mib")
"""Those for which the TPU compiler is asked."""


@dataclass(frozen=True)
class NetworkCosts:
    """Measures of networks of one shape, as functions of a genotype.

    `params_m` is millions of parameters, and `flops_m` millions of floating-point operations for
    one image: those of convolutions and matrix products, of which a multiplication and an addition
    are two. Both are the same on every platform, and no accelerator is started. The others are
    of a batch of `batch_size` images at inference, on one device of `topology`: what the TPU
    compiler expects, with no TPU there. Latency is its estimate of cycles over the clock, memory
    all that the program needs. They take seconds to minutes of compiling, once for each network:
    equal genotypes are known by their canonical form, and results are kept on disk. As limits they
    are measured one by one, before a candidate is handed out: workers that train faster than this
    compiles wait for it.

    ValueError for a topology that does not exist, and `gpipe_jax.errors.CompilerNotInstalledError`
    where the TPU compiler is missing.
    """

    cells_per_stack: int = 1
    """Normal cells in each of the three stacks (N)."""
    filters: int = 8
    """Of the first stack (F)."""
    image: int = 8
    channels: int = 1
    classes: int = 10
    dtype: str = "float32"
    batch_size: int = 1
    topology: str | None = None
    """A TPU slice, as v5e:1x1 or v5litepod-4."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle; runs of versions before 0.2 have other names of fields."""
        vars(self).update(old_names.current_fields("NetworkCosts", state))

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: unknown {self.dtype!r}; known: {', '.join(DTYPES)}")
        if self.topology is None:
            return
        from gpipe_jax.tpu_compiler import libtpu, topologies

        topologies.parse(self.topology)
        libtpu.check_installed()

    def params_m(self, genotype: Genotype) -> float:
        """Millions of parameters. About a second for a network that is new."""
        return _parameters(self, genotype.canonical()) / 1e6

    def flops_m(self, genotype: Genotype) -> float:
        """Millions of floating-point operations for one image. Seconds for a new network."""
        return _operations(self, genotype.canonical()) / 1e6

    def latency_ms(self, genotype: Genotype) -> float:
        """Milliseconds of a batch at inference; infinite if the network does not fit."""
        from gpipe_jax.tpu_compiler import topologies

        found = self._compiled(genotype)
        clock = topologies.parse(self.topology or "").generation.clock_ghz * 1e9
        return 1e3 * found.cycles / clock if found.fits else math.inf

    def memory_mib(self, genotype: Genotype) -> float:
        """MiB of a device at inference; infinite if the compiler does not say."""
        found = self._compiled(genotype)
        return found.needed_bytes / 2**20 if found.needed_bytes else math.inf

    def _compiled(self, genotype: Genotype) -> "Compiled":
        if self.topology is None:
            raise ValueError(
                "`topology` is not given, but latency_ms and memory_mib are those on a TPU: give "
                "such as topology='v5e:1x1'"
            )
        found = _compile(self, genotype.canonical())
        if found.error is not None and found.short_by_bytes is None:
            warnings.warn(
                f"the TPU compiler failed for a network, which counts as too slow and too large: "
                f"{found.error}",
                RuntimeWarning,
                stacklevel=3,
            )
        return found

    def _network(self) -> "Static":
        from nas.training.network import Shape
        from nas.training.static import Static

        sizes = (self.cells_per_stack, self.filters, self.image, self.channels, self.classes)
        return Static(Shape(*sizes, dtype=self.dtype))


@functools.lru_cache(maxsize=100_000)
def _parameters(costs: NetworkCosts, genotype: Genotype) -> int:
    from nas.costs import inference

    return inference.parameters(costs._network(), genotype)


@functools.lru_cache(maxsize=100_000)
def _operations(costs: NetworkCosts, genotype: Genotype) -> int:
    from nas.costs import inference

    return inference.operations(costs._network(), genotype)


@functools.lru_cache(maxsize=100_000)
def _compile(costs: NetworkCosts, genotype: Genotype) -> "Compiled":
    from nas.costs import inference

    network = costs._network()
    return inference.compile_for(network, genotype, costs.batch_size, costs.topology or "")
