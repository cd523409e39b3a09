"""Making a plan of one layout: by analysis, and with a topology by the compiler."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from gpipe_jax.layers.shape_inference import elements
from gpipe_jax.pipeline.device_step import Branch
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.planner import programs, step_time
from gpipe_jax.planner.job import Job, Layout
from gpipe_jax.planner.plan import Plan, StagePlan, gib
from gpipe_jax.planner.step_time import StageTimes, StepTime
from gpipe_jax.tpu_compiler import libtpu
from gpipe_jax.tpu_compiler.compiler import compile_programs
from gpipe_jax.tpu_compiler.results import Compiled, Program
from gpipe_jax.tpu_compiler.topologies import Topology
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils.text import GIB
from gpipe_jax.utils.trees import tree_bytes


class Compiling(NamedTuple):
    """For which devices, and how patiently."""

    topology: Topology
    timeout_s: float | None = None
    show: Callable[[str], None] | None = None

    def __call__(self, wanted: Sequence[Program]) -> dict[str, Compiled]:
        """The results of programs, by name."""
        found = compile_programs(wanted, self.topology, timeout_s=self.timeout_s, show=self.show)
        return {compiled.name: compiled for compiled in found}

    def seconds(self, compiled: Compiled) -> float:
        """The compiler's estimate of how long a program takes."""
        if compiled.error:
            raise ValueError(f"{compiled.name} alone did not compile: {compiled.error}")
        return compiled.cycles / (self.topology.generation.clock_ghz * 1e9)


def analyse(job: Job, layout: Layout, cost: Any = "flops") -> Plan:
    """What can be said without a compiler."""
    return _plan(job.trainer(layout, cost), layout)


class Prediction(NamedTuple):
    """How long a layout's step takes."""

    stages: StageTimes
    step: StepTime


def with_compiler(job: Job, layout: Layout, compiling: Compiling, cost: Any = "flops") -> Plan:
    """The whole step compiled, and its time predicted from its parts if these fit alone."""
    trainer = _trainer(job, layout, compiling, cost)
    found = compiling([programs.whole_step(trainer), *_parts(trainer)])
    whole = found.pop("step")
    failed = [
        f"no time, as {part.name} alone {part.error}" for part in found.values() if part.error
    ]
    endless = [
        f"{part.name} has {part.endless_loops} loop(s) of unknown length: its predicted time "
        f"counts one round of each"
        for part in found.values()
        if part.endless_loops
    ]
    predicted = None if failed else _prediction(trainer, found, compiling)
    plan = _plan(trainer, layout, compiling.topology, whole, predicted)
    return replace(plan, warnings=[*plan.warnings, *failed[:1], *endless])


def predict(
    job: Job, layout: Layout, compiling: Compiling, cost: Any = "flops"
) -> tuple[Trainer, Prediction]:
    """From the cycles of each stage and of the update; the whole step is not compiled.

    `cost` is what the partition balances; "cycles" is the time of each layer, compiled alone.
    """
    trainer = _trainer(job, layout, compiling, cost)
    return trainer, _prediction(trainer, compiling(_parts(trainer)), compiling)


def _trainer(job: Job, layout: Layout, compiling: Compiling, cost: Any) -> Trainer:
    check_mesh(layout, compiling.topology)
    if isinstance(cost, str) and cost == "cycles":
        cost = layer_seconds(job, layout, compiling)
    return job.trainer(layout, cost)


def _parts(trainer: Trainer) -> list[Program]:
    return [*programs.of_stages(trainer.pipe), programs.update(trainer)]


def _prediction(trainer: Trainer, found: dict[str, Compiled], compiling: Compiling) -> Prediction:
    pipe = trainer.pipe

    def seconds(operation: Literal["forward", "backward"]) -> list[float]:
        branches = [Branch(operation, s) for s in pipe.stages.representatives]
        return [compiling.seconds(found[str(branch)]) for branch in branches]

    times = step_time.stage_times(seconds("forward"), seconds("backward"), pipe.stages.remat)
    step = step_time.step_time(
        pipe.stages,
        pipe.schedule,
        times,
        compiling.topology,
        replicas=pipe.replicas,
        update_s=compiling.seconds(found["update"]),
    )
    return Prediction(times, step)


def layer_seconds(job: Job, layout: Layout, compiling: Compiling) -> list[float]:
    """The time of each layer's backward, recomputation included, for the partitioner."""
    pipe = job.trainer(layout._replace(partition="auto")).pipe
    found = compiling(programs.of_layers(pipe, kinds=("backward",)))
    return [compiling.seconds(found[f"backward {i}"]) for i in programs.first_alike(pipe)]


def check_mesh(layout: Layout, topology: Topology) -> None:
    """Raise ValueError unless the mesh divides the topology."""
    need, have = layout.stages * layout.data, topology.devices
    if have % need:
        legal = ", ".join(str(n) for n in range(1, have + 1) if have % n == 0)
        raise ValueError(
            f"a mesh of {layout.stages} stages x {layout.data} data replicas has {need} devices, "
            f"which do not divide the {have} of {topology}; make stages x data one of {legal}"
        )


def _plan(
    trainer: Trainer,
    layout: Layout,
    topology: Topology | None = None,
    compiled: Compiled | None = None,
    predicted: Prediction | None = None,
) -> Plan:
    step = predicted.step if predicted else None
    pipe, memory = trainer.pipe, gib(trainer.device_bytes())
    analysed = sum(memory.values())
    permutes = _permutes(compiled)
    return Plan(
        topology=None if topology is None else str(topology),
        layout={**layout._asdict(), "partition": list(pipe.partition.boundaries)},
        parameters=elements(pipe.shapes),
        batch_size=pipe.batch_size,
        fits=_fits(compiled),
        hbm_needed_gib=compiled.needed_bytes / GIB
        if compiled and compiled.needed_bytes
        else analysed,
        hbm_usable_gib=topology.generation.hbm_gib if topology else None,
        hbm_analysed_gib=analysed,
        memory_gib=memory,
        compiled_gib=_compiled_gib(compiled),
        bubble_fraction=pipe.schedule.bubble_fraction,
        imbalance=pipe.partition.imbalance,
        step_time_s=step.total if step else None,
        time_s=step._asdict() if step else None,
        throughput=pipe.batch_size / step.total if step else None,
        collectives=_count(compiled, in_loop=False),
        collectives_in_loops=_count(compiled, in_loop=True),
        asynchronous=all(permutes) if permutes else None,
        stages=_stages(pipe, predicted.stages if predicted else None),
        versions=libtpu.versions(),
        compile_s=compiled.compile_s if compiled else None,
        problem=compiled.error if compiled else None,
        warnings=_warnings(pipe, topology),
    )


def _fits(compiled: Compiled | None) -> bool | None:
    if compiled is None or (compiled.error and compiled.short_by_bytes is None):
        return None
    return compiled.fits


def _compiled_gib(compiled: Compiled | None) -> dict[str, float] | None:
    if compiled is None or compiled.error:
        return None
    returned = compiled.output_bytes - compiled.alias_bytes
    return gib(
        {
            "arguments": compiled.argument_bytes,
            "temporaries": compiled.temporary_bytes,
            "results": returned,
            "code": compiled.code_bytes,
        }
    )


def _count(compiled: Compiled | None, *, in_loop: bool) -> dict[str, int] | None:
    if compiled is None or compiled.error:
        return None
    return dict(Counter(c.kind for c in compiled.collectives if c.in_loop == in_loop))


def _permutes(compiled: Compiled | None) -> list[bool]:
    found = compiled.collectives if compiled else ()
    return [c.asynchronous for c in found if c.kind == "collective-permute"]


def _stages(pipe: Pipeline, times: StageTimes | None) -> list[StagePlan]:
    stages, total = pipe.stages, sum(pipe.partition.costs) or 1.0
    found = []
    for s, cut in enumerate(stages.geometry.layer_ranges):
        shapes = [pipe.shapes[i] for i in cut]
        own = tree_bytes([shape.params for shape in shapes])
        found.append(
            StagePlan(
                layers=(cut[0], cut[-1]),
                first_layer=str(shapes[0].layer),
                cost=pipe.partition.costs[s] / total,
                parameters=elements(shapes),
                boundary_bytes=tree_bytes(stages.geometry.input(s)),
                padding_bytes=stages.params[stages.geometry.at(s)[0]].device_bytes() - own,
                forward_s=times.forward[s] if times else None,
                backward_s=times.backward[s] if times else None,
            )
        )
    return found


def _warnings(pipe: Pipeline, topology: Topology | None) -> list[str]:
    if topology is None:
        return []
    used, found = pipe.stages.geometry.num_devices * pipe.replicas, []
    if used < topology.devices:
        found.append(
            f"the mesh uses {used} of the {topology.devices} devices of {topology}; "
            f"mesh.data={topology.devices // pipe.stages.geometry.num_devices} would use all of them"
        )
    other = libtpu.version_warning()
    return [*found, other] if other else found
