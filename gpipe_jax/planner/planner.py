"""Plan a run of a config, a file or layers: one layout, or the best ones."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpipe_jax.config.run import Config
from gpipe_jax.layers.layer import Layer
from gpipe_jax.planner import predict
from gpipe_jax.planner import search as layout_search
from gpipe_jax.planner.job import Job, Layout, from_config
from gpipe_jax.planner.plan import Plan
from gpipe_jax.planner.predict import Compiler
from gpipe_jax.planner.search import Ranking
from gpipe_jax.tpu_compiler import topologies

UNTIMED = (
    "this plan balances operations, while training balances measured times (cost 'time'), since a "
    "plan runs nothing; --cost cycles balances compiled times"
)
TRAINED_BY_TIME = (
    "gpipe train balances measured times (pipeline.cost: time), which a plan does not know, and "
    "may cut elsewhere; gpipe plan --out FILE, then gpipe train --plan FILE, trains with the cut "
    "of this plan"
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
    """Predict whether a run fits a TPU slice, how fast it is, and why; run nothing.

    Args:
        network: A config, the path of its file, or a list of layers.
        topology: The TPU slice to compile for, as "v3:4x4" or a Cloud name as "v3-32". None does
            not compile, and predicts no times. Default: None.
        slices: The number of such slices, connected by the data-centre network. Default:
            1.
        cost: What the partition balances: "flops", "cycles" (each layer's time as compiled for the
            topology), or one number for each layer. Default: the config's own; for layers
            "flops".
        timeout_s: The longest that the compilation of one program may take, in seconds. Default:
            no limit.
        show: Called every few seconds with a line of text about the compilation. Default:
            nothing is shown.
        **options: Only for layers. Required: `loss`, `example` (a batch or its shapes) and `tx` (an
            optax optimizer). Optional, of the layout: `stages` (default 1), `data` (1),
            `micro_batches` (1), `schedule` ("1f1b"), `chunks` (1), `remat` ("stage"), `partition`
            ("auto"). Optional, of the job: `ema`, `steps`, `keys_per`, `memory_limit`.

    Returns:
        The plan; print it to see a table.

    Raises:
        ValueError: The topology or an option is invalid, or the mesh does not fit it.
        TypeError: `options` are missing for layers, or given for a config.
        CompilerNotInstalledError: The package libtpu is not installed.
        TimeoutError: A compilation took longer than `timeout_s`.

    Example::

        print(gpipe.plan("configs/transformer_48.yaml", topology="v3:4x4"))
        gpipe.plan(
            layers, loss=loss, example=batch, tx=optax.adam(1e-3), stages=8, micro_batches=32
        )
    """
    job, layout, config = _describe(network, options)
    cost = cost or (config.pipeline.cost if config else "flops")
    untimed = isinstance(cost, str) and cost == "time"
    if untimed:  # there is no device to measure on
        cost = "flops"
    if topology is None:
        if isinstance(cost, str) and cost == "cycles":
            raise ValueError("`cost` 'cycles' needs a `topology` to compile for, such as 'v3:4x4'")
        result = predict.analyse(job, layout, cost)
    else:
        compiler = Compiler(topologies.parse(topology, slices), timeout_s, show)
        result = predict.compile_plan(job, layout, compiler, cost)
    if untimed:
        result = replace(result, warnings=[*result.warnings, UNTIMED])
    elif job.cost == "time" and layout.partition == "auto":
        result = replace(result, warnings=[*result.warnings, TRAINED_BY_TIME])
    return _with_config(result, config)


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
    """Find the fastest layouts of a run on all devices of a slice.

    The search analyses all numbers of stages, replicas and micro-batches (with a power of two of
    examples) that use all devices, every schedule, 2 and 4 chunks, and recomputation layer by layer
    if that of whole stages is too large. It compiles the fastest ones that should fit, until
    `compile_best` of them do. The results of training are the same for all layouts.

    The other arguments are as in `plan`. Raises ValueError if no layout fits.
    """
    job, _, config = _describe(network, options)
    compiler = Compiler(topologies.parse(topology, slices), timeout_s, show)
    ranking = layout_search.search(job, compiler, compile_best)
    return ranking._replace(plans=[_with_config(plan, config) for plan in ranking.plans])


def _describe(network: Any, options: dict) -> tuple[Job, Layout, Config | None]:
    """Return the job, the layout and the config (None for layers) of `plan`'s arguments."""
    if isinstance(network, str | Path):
        from gpipe_jax.config import loader

        network = loader.load(network)
    if isinstance(network, Config):
        if options:
            raise TypeError(
                f"a config has all options; unexpected {sorted(options)}: set them in the config"
            )
        return *from_config(network), network
    layout = {k: options.pop(k) for k in Layout._fields if k in options}
    missing = [k for k in ("loss", "example", "tx") if k not in options]
    if missing:
        raise TypeError(f"a plan of layers needs {', '.join(missing)} too; give them by name")
    return Job(layers=list(network), **options), Layout(**layout), None


def _with_config(plan: Plan, config: Config | None) -> Plan:
    return replace(plan, config=config.model_dump(mode="json") if config else None)
