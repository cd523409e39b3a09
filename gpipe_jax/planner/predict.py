"""Make the plan of one layout, by analysis or with the compiler."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

from gpipe_jax.errors import ArgumentError
from gpipe_jax.layers.shape_inference import elements
from gpipe_jax.pipeline.device_step import Branch
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.planner import programs, step_time, training_cut
from gpipe_jax.planner.job import Job, Layout
from gpipe_jax.planner.plan import Plan, StagePlan, to_gib
from gpipe_jax.planner.programs import STEP, UPDATE, LayerBranch
from gpipe_jax.planner.step_time import StageTimes, StepTime
from gpipe_jax.tpu_compiler import libtpu
from gpipe_jax.tpu_compiler.compiler import compile_programs
from gpipe_jax.tpu_compiler.results import Compiled, Program
from gpipe_jax.tpu_compiler.topologies import Topology
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils.text import GIB
from gpipe_jax.utils.trees import tree_bytes

Key = TypeVar("Key", bound=Hashable)
Piece = Branch | str  # a branch of a stage, STEP or UPDATE


class Compiler(NamedTuple):
    """Compile programs for one topology."""

    topology: Topology
    timeout_s: float | None = None
    show: Callable[[str], None] | None = None

    def compile(self, targets: Mapping[Key, Program]) -> dict[Key, Compiled]:
        """Compile programs and return the result of each."""
        results = compile_programs(
            [*targets.values()], self.topology, timeout_s=self.timeout_s, show=self.show
        )
        return dict(zip(targets, results, strict=True))

    def seconds(self, compiled: Compiled) -> float:
        """Return the compiler's estimate of the time that a program takes."""
        if compiled.error:
            raise ValueError(f"{compiled.name} alone did not compile: {compiled.error}")
        return compiled.cycles / (self.topology.generation.clock_ghz * 1e9)


def analyse(job: Job, layout: Layout, cost: Any = "flops") -> Plan:
    """Make a plan without a compiler: memory and bubble, but no times.

    It counts operations as the training does: for a TPU, unless that simulates its devices.
    """
    trainer = job.build_trainer(layout, cost, "cpu" if job.simulated else "tpu")
    return _with_training_cuts(_plan(trainer, layout), trainer, job, layout, cost)


class Prediction(NamedTuple):
    """Hold the predicted times of a layout."""

    stages: StageTimes
    step: StepTime


def compile_plan(job: Job, layout: Layout, compiler: Compiler, cost: Any = "flops") -> Plan:
    """Compile the whole step, and predict its time from its pieces if each of them fits."""
    trainer = _trainer(job, layout, compiler, cost)
    pieces = compiler.compile({STEP: programs.whole_step(trainer), **_timed_programs(trainer)})
    step = pieces.pop(STEP)
    failed = [
        f"no time, as {piece.name} alone {piece.error}" for piece in pieces.values() if piece.error
    ]
    endless = [
        f"{piece.name} has {piece.endless_loops} loop(s) of unknown length: its predicted time "
        f"counts one iteration of each"
        for piece in pieces.values()
        if piece.endless_loops
    ]
    predicted = None if failed else _prediction(trainer, pieces, compiler)
    plan = _plan(trainer, layout, compiler.topology, step, predicted)
    plan = replace(plan, warnings=[*plan.warnings, *failed[:1], *endless])
    return _with_training_cuts(plan, trainer, job, layout, cost)


def _with_training_cuts(plan: Plan, trainer: Trainer, job: Job, layout: Layout, cost: Any) -> Plan:
    compiled = plan.topology is not None
    if isinstance(cost, str) and cost == "cycles":
        plan = replace(plan, costs="compiled times of the layers")
    found = training_cut.warnings(trainer.pipe, job, layout, cost, compiled=compiled)
    return replace(plan, warnings=[*plan.warnings, *found])


def predict_step(
    job: Job, layout: Layout, compiler: Compiler, cost: Any = "flops"
) -> tuple[Trainer, Prediction]:
    """Predict the time of a step from the cycles of its pieces, without compiling the whole step.

    `cost` is what the partition balances; "cycles" is the time of each layer, compiled alone.
    """
    trainer = _trainer(job, layout, compiler, cost)
    return trainer, _prediction(trainer, compiler.compile(_timed_programs(trainer)), compiler)


def _trainer(job: Job, layout: Layout, compiler: Compiler, cost: Any) -> Trainer:
    check_mesh(layout, compiler.topology)
    if isinstance(cost, str) and cost == "cycles":
        cost = layer_seconds(job, layout, compiler)
    return job.build_trainer(layout, cost)


def _timed_programs(trainer: Trainer) -> dict[Piece, Program]:
    return {**programs.of_stages(trainer.pipe), UPDATE: programs.update(trainer)}


def _prediction(trainer: Trainer, pieces: dict[Piece, Compiled], compiler: Compiler) -> Prediction:
    pipe = trainer.pipe

    def seconds(operation: programs.Operation) -> list[float]:
        branches = [Branch(operation, s) for s in pipe.stages.representatives]
        return [compiler.seconds(pieces[branch]) for branch in branches]

    times = step_time.stage_times(seconds("forward"), seconds("backward"), pipe.stages.remat)
    step = step_time.step_time(
        pipe.stages,
        pipe.schedule,
        times,
        compiler.topology,
        replicas=pipe.replicas,
        update_s=compiler.seconds(pieces[UPDATE]),
    )
    return Prediction(times, step)


def layer_seconds(job: Job, layout: Layout, compiler: Compiler) -> list[float]:
    """Return the time of each layer's backward, with recomputation, for the partitioner."""
    pipe = job.build_trainer(layout._replace(partition="auto")).pipe
    layers = compiler.compile(programs.of_layers(pipe, operations=("backward",)))
    branches = [LayerBranch("backward", i) for i in programs.representatives(pipe)]
    return [compiler.seconds(layers[branch]) for branch in branches]


def check_mesh(layout: Layout, topology: Topology) -> None:
    """Raise ArgumentError unless the devices of the mesh divide those of the topology."""
    needed, available = layout.stages * layout.data, topology.devices
    if available % needed:
        legal = ", ".join(str(n) for n in range(1, available + 1) if available % n == 0)
        raise ArgumentError(
            "topology",
            f"a mesh of {layout.stages} stages x {layout.data} data replicas has {needed} devices, "
            f"which do not divide the {available} of {topology}; make stages x data one of {legal} "
            f"or use another topology",
        )


def _plan(
    trainer: Trainer,
    layout: Layout,
    topology: Topology | None = None,
    compiled: Compiled | None = None,
    predicted: Prediction | None = None,
) -> Plan:
    step = predicted.step if predicted else None
    pipe, memory = trainer.pipe, to_gib(trainer.device_bytes())
    analysed = needed = sum(memory.values())
    if compiled and compiled.needed_bytes:
        needed = compiled.needed_bytes / GIB
    permutes = _permutes(compiled)
    return Plan(
        topology=None if topology is None else str(topology),
        layout={**layout._asdict(), "partition": list(pipe.partition.boundaries)},
        parameters=elements(pipe.shapes),
        batch_size=pipe.batch_size,
        fits=_fits(compiled),
        hbm_needed_gib=needed,
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
        costs=pipe.cost_kind,
    )


def _fits(compiled: Compiled | None) -> bool | None:
    """Return whether a program fits; None if it is not compiled, or failed for another reason."""
    if compiled is None or (compiled.error and compiled.short_by_bytes is None):
        return None
    return compiled.fits


def _compiled_gib(compiled: Compiled | None) -> dict[str, float] | None:
    if compiled is None or compiled.error:
        return None
    returned = compiled.output_bytes - compiled.alias_bytes
    return to_gib(
        {
            "arguments": compiled.argument_bytes,
            "temporaries": compiled.temporary_bytes,
            "results": returned,
            "code": compiled.code_bytes,
        }
    )


def _count(compiled: Compiled | None, *, in_loop: bool) -> dict[str, int] | None:
    """Count the collectives by kind."""
    if compiled is None or compiled.error:
        return None
    return dict(Counter(c.kind for c in compiled.collectives if c.in_loop == in_loop))


def _permutes(compiled: Compiled | None) -> list[bool]:
    """Return for each permute whether it is asynchronous."""
    collectives = compiled.collectives if compiled else ()
    return [c.asynchronous for c in collectives if c.kind == "collective-permute"]


def _stages(pipe: Pipeline, times: StageTimes | None) -> list[StagePlan]:
    stages, total = pipe.stages, sum(pipe.partition.costs) or 1.0
    plans = []
    for s, layers in enumerate(stages.geometry.layer_ranges):
        shapes = [pipe.shapes[i] for i in layers]
        own = tree_bytes([(shape.params, shape.fixed) for shape in shapes])
        c, _ = stages.geometry.at(s)
        stored = stages.params[c].device_bytes() + stages.fixed[c].device_bytes()
        plans.append(
            StagePlan(
                layers=(layers[0], layers[-1]),
                first_layer=str(shapes[0].layer),
                cost_fraction=pipe.partition.costs[s] / total,
                parameters=elements(shapes),
                boundary_bytes=tree_bytes(stages.geometry.input(s)),
                padding_bytes=stored - own,
                forward_s=times.forward[s] if times else None,
                backward_s=times.backward[s] if times else None,
            )
        )
    return plans


def _warnings(pipe: Pipeline, topology: Topology | None) -> list[str]:
    if topology is None:
        return []
    num_devices, warnings = pipe.stages.geometry.num_devices, []
    used = num_devices * pipe.replicas
    if used < topology.devices:
        warnings.append(
            f"the mesh uses {used} of the {topology.devices} devices of {topology}; "
            f"mesh.data={topology.devices // num_devices} would use all of them"
        )
    version_warning = libtpu.version_warning()
    return [*warnings, version_warning] if version_warning else warnings
