"""Plans of a config, a file or layers: of one layout, or of the best ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpipe_jax.config.run import Config
from gpipe_jax.layers.layer import Layer
from gpipe_jax.planner import job, predict
from gpipe_jax.planner import search as searching
from gpipe_jax.planner.job import Job, Layout
from gpipe_jax.planner.plan import Plan
from gpipe_jax.planner.predict import Compiling
from gpipe_jax.planner.search import Ranking
from gpipe_jax.tpu_compiler import topologies

UNTIMED = (
    "stages balance operations here, not measured time as in training (cost 'time'): nothing is "
    "run for a plan; --cost cycles balances compiled times"
)


def plan(
    network: Config | str | Path | Sequence[Layer],
    *,
    topology: str | None = None,
    slices: int = 1,
    cost: Any = None,
    timeout_s: float | None = None,
    show: Callable[[str], None] | None = None,
    **options: Any,
) -> Plan:
    """Whether a run fits a TPU slice, how fast it would be, and why; nothing is run.

        print(plan("configs/transformer_48.yaml", topology="v3:4x4"))
        plan(layers, loss=loss, example=batch, tx=optax.adam(1e-3), stages=8, micro_batches=32)

    `network` is a config, its file, or layers; with layers, `options` are `loss`, `example`, `tx`
    and what `Layout` and `Job` have beside. `topology` is "v3:4x4" or a Cloud name as "v3-32";
    without one the compiler is not asked, and there is no time. `cost` is what the partition
    balances: that of the config, or "cycles", each layer's time as compiled for the topology.
    Compilations longer than `timeout_s` raise TimeoutError; `show` is told how they go on.
    """
    work, layout, config = _describe(network, options)
    cost = cost or (config.pipeline.cost if config else "flops")
    untimed = isinstance(cost, str) and cost == "time"
    if untimed:  # there is no device to measure on
        cost = "flops"
    if topology is None:
        if isinstance(cost, str) and cost == "cycles":
            raise ValueError("`cost` 'cycles' needs a `topology` to compile for, as 'v3:4x4'")
        found = predict.analyse(work, layout, cost)
    else:
        compiling = Compiling(topologies.parse(topology, slices), timeout_s, show)
        found = predict.with_compiler(work, layout, compiling, cost)
    if untimed:
        found = replace(found, warnings=[*found.warnings, UNTIMED])
    return _of(config, found)


def search(
    network: Config | str | Path | Sequence[Layer],
    *,
    topology: str,
    slices: int = 1,
    compile_best: int = 3,
    timeout_s: float | None = None,
    show: Callable[[str], None] | None = None,
    **options: Any,
) -> Ranking:
    """Plans of other layouts of a run on all of a slice's devices, the fastest first.

    Looked at by analysis are all numbers of stages, replicas and micro-batches (of a power of two
    of examples) that use all devices, every schedule, 2 and 4 chunks, and recomputation layer by
    layer where that of whole stages is too large. The fastest that should fit are compiled, until
    `compile_best` do. The results of training are the same for all.
    """
    work, _, config = _describe(network, options)
    compiling = Compiling(topologies.parse(topology, slices), timeout_s, show)
    ranking = searching.search(work, compiling, compile_best)
    return ranking._replace(plans=[_of(config, p) for p in ranking.plans])


def _describe(network: Any, options: dict) -> tuple[Job, Layout, Config | None]:
    if isinstance(network, str | Path):
        from gpipe_jax.config import loader

        network = loader.load(network)
    if isinstance(network, Config):
        if options:
            raise TypeError(f"a config says everything itself; unexpected {sorted(options)}")
        return *job.from_config(network), network
    layout = {k: options.pop(k) for k in Layout._fields if k in options}
    missing = [k for k in ("loss", "example", "tx") if k not in options]
    if missing:
        raise TypeError(f"a plan of layers needs {', '.join(missing)} too")
    return Job(layers=list(network), **options), Layout(**layout), None


def _of(config: Config | None, found: Plan) -> Plan:
    return replace(found, config=config.model_dump(mode="json") if config else None)
