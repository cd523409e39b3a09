"""Search for the best layout: analyse all legal ones, and compile the few best."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from gpipe_jax.errors import ArgumentError
from gpipe_jax.partition import solver
from gpipe_jax.partition.costs import LayerCost
from gpipe_jax.pipeline import memory, remat
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.planner import predict, step_time
from gpipe_jax.planner.job import Job, Layout
from gpipe_jax.planner.plan import Plan
from gpipe_jax.planner.predict import Compiler
from gpipe_jax.schedules.generators import CHUNKED_TRAINING, TRAINING, make
from gpipe_jax.tpu_compiler.generations import Generation
from gpipe_jax.tpu_compiler.topologies import Topology
from gpipe_jax.utils import text
from gpipe_jax.utils.checks import check_count
from gpipe_jax.utils.text import GIB
from gpipe_jax.utils.trees import tree_bytes

CHUNKS = (2, 4)  # of the interleaved schedule
MAX_COMPILED = 3  # times `compile_best`: more are compiled if some turn out not to fit
SHARE_OF_PEAK = 0.5  # roughly reached by compiled layers; only the ranking depends on it


class Candidate(NamedTuple):
    """Hold a layout and its analysis."""

    layout: Layout
    boundaries: tuple[int, ...]  # the first layer of each stage but the first
    needed_gib: float
    step_s: float


class Ranking(NamedTuple):
    """Hold compiled plans (the fastest that fits first), and counts of the analysed layouts."""

    plans: list[Plan]
    analysed: int
    too_large: int

    def __str__(self) -> str:
        settings = ("stages", "data", "micro-batches", "chunks", "schedule", "remat")
        header = ("", *settings, "fits", "GiB", "step", "examples/s")
        rows = [header, *(self._row(n, plan) for n, plan in enumerate(self.plans, 1))]
        counts = f"{self.analysed} layouts analysed, {self.too_large} of them too large"
        return (
            f"{text.text_table(rows)}\n{counts}; {len(self.plans)} compiled, not run\n"
            f"each layout has its own cut: write it with --out FILE and train with gpipe train "
            f"--plan FILE; pipeline.partition=auto may cut elsewhere"
        )

    @staticmethod
    def _row(n: int, plan: Plan) -> tuple[str, ...]:
        names = ("stages", "data", "micro_batches", "chunks", "schedule", "remat")
        fits = {True: "yes", False: "no", None: "unknown"}[plan.fits]
        step, throughput = "unknown", "unknown"
        if plan.step_time_s is not None:
            step, throughput = f"{plan.step_time_s:.4g} s", f"{plan.throughput:.4g}"
        settings = (str(plan.layout[name]) for name in names)
        return (str(n), *settings, fits, f"{plan.hbm_needed_gib:.2f}", step, throughput)

    def to_dict(self) -> dict:
        """Return a dictionary for JSON."""
        plans = [plan.to_dict() for plan in self.plans]
        return {"plans": plans, "looked_at": self.analysed, "too_large": self.too_large}


def search(job: Job, compiler: Compiler, compile_best: int) -> Ranking:
    """Compile the best of all candidates that should fit; raise ValueError if none should."""
    check_count("compile_best", compile_best)
    limit = compiler.topology.generation.hbm_gib
    analysed = list(candidates(job, compiler.topology))
    fitting = sorted((c for c in analysed if c.needed_gib <= limit), key=lambda c: c.step_s)
    if not fitting:
        raise ArgumentError("topology", _nothing_fits(analysed, compiler.topology))
    plans: list[Plan] = []
    for candidate in fitting[: MAX_COMPILED * compile_best]:
        layout = candidate.layout._replace(partition=list(candidate.boundaries))
        plans.append(predict.compile_plan(job, layout, compiler))
        if sum(plan.fits is True for plan in plans) == compile_best:
            break
    plans.sort(key=lambda p: (not p.fits, p.step_time_s or math.inf))
    return Ranking(plans, len(analysed), len(analysed) - len(fitting))


def _nothing_fits(analysed: list[Candidate], topology: Topology) -> str:
    """Explain why there is no layout, and what would help."""
    if not analysed:
        return (
            f"the batch does not split over the {topology.devices} devices of {topology} in any "
            f"way; make its size a multiple of a divisor of that number"
        )
    smallest = min(analysed, key=lambda c: c.needed_gib)
    limit = topology.generation.hbm_gib
    return (
        f"no layout fits {topology}: the smallest, {smallest.layout}, needs "
        f"{smallest.needed_gib:.2f} GiB on each device, {smallest.needed_gib - limit:.2f} more "
        f"than its {limit:.2f}; use more devices (more stages), a smaller batch, or bfloat16 "
        f"activations"
    )


def candidates(job: Job, topology: Topology) -> Iterator[Candidate]:
    """Yield every legal layout on all devices.

    Policies that recompute more are tried only if a layout is too large without them.
    """
    count = jax.tree.leaves(job.example["inputs"])[0].shape[0]
    share = _optimizer_share(job)
    for size in _divisors(count):
        if size & (size - 1):  # TPUs pad other sizes to a power of two
            continue
        alone = _on_one_device(job, size)
        for K in _divisors(topology.devices):
            D = topology.devices // K
            M, rest = divmod(count, D * size)
            if rest or not M or (topology.slices > 1 and K % topology.slices):
                continue
            for kind, V in _schedules(K, len(alone.shapes)):
                yield from _with_policies(share, alone, topology, Layout(K, D, M, kind, V))


def _schedules(K: int, layers: int) -> list[tuple[str, int]]:
    """Return (schedule, chunks) for K devices; on one device all schedules are the same."""
    if layers < K:
        return []
    if K == 1:
        return [("1f1b", 1)]
    chunked = [(kind, V) for kind in CHUNKED_TRAINING for V in CHUNKS if layers >= K * V]
    return [*((kind, 1) for kind in TRAINING if kind not in CHUNKED_TRAINING), *chunked]


def _on_one_device(job: Job, size: int) -> Pipeline:
    """Return the network on one device, with micro-batches of this size: shapes and costs."""
    example = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), job.example
    )
    return job._replace(example=example).build_pipeline(Layout())


def _optimizer_share(job: Job) -> float:
    """Return the bytes of optimizer and average for each byte of the parameters, on one device."""
    trainer = job._replace(memory_limit=None).build_trainer(Layout())
    held = trainer.train_step.local_shapes
    parameters = trainer.pipe.stages.params.device_bytes()
    return tree_bytes((held.opt_state, held.average)) / max(parameters, 1)


def _with_policies(
    share: float, alone: Pipeline, topology: Topology, layout: Layout
) -> Iterator[Candidate]:
    """Yield a layout with each recomputation policy until one fits."""
    limit = topology.generation.hbm_gib
    for policy in remat.POLICIES:
        candidate = _analyse(share, alone, topology, layout._replace(remat=policy))
        yield candidate
        if candidate.needed_gib <= limit:
            return


def _analyse(share: float, alone: Pipeline, topology: Topology, layout: Layout) -> Candidate:
    """Estimate the memory and the step time of a layout from the costs of single layers.

    Args:
        share: What `_optimizer_share` returns: a large optimizer is not traced for each layout.
        alone: The network on one device.
        topology: The slice.
        layout: The layout.
    """
    K, V, M = layout.stages, layout.chunks, layout.micro_batches
    backward = [_layer_time_s(c, topology.generation) for c in alone.costs]
    cut = solver.partition(backward, K * V)
    stages = Stages(alone.shapes, cut.layer_ranges, chunks=V, remat=remat.by_name(layout.remat))
    schedule = make(layout.schedule, K, M, V)
    held = memory.of_device(
        stages,
        alone.costs,
        schedule,
        optimizer_bytes=round(share * stages.params.device_bytes()),
        loss=alone.loss,
        micro_batch=alone.micro_batch_shapes,
    )
    # A backward with one recomputation takes three times as long as a forward.
    once = [sum(backward[i] for i in layers) for layers in cut.layer_ranges]
    forward_s = [time / 3 for time in once]
    more = stages.remat.forwards - 1
    backward_s = [time + more * forward for time, forward in zip(once, forward_s, strict=True)]
    times = step_time.stage_times(forward_s, backward_s, stages.remat)
    generation = topology.generation
    update_s = 3 * memory.float32_bytes(stages) / generation.hbm_bytes_s
    step = step_time.step_time(
        stages, schedule, times, topology, replicas=layout.data, update_s=update_s
    )
    return Candidate(layout, cut.boundaries, sum(held.values()) / GIB, step.total)


def _layer_time_s(cost: LayerCost, generation: Generation) -> float:
    """Estimate the time of a layer's backward, with one recomputation, from FLOPs and bytes."""
    assert cost.flops is not None  # the costs of `_on_one_device` are counted
    moved_bytes = 3 * cost.parameter_bytes + 2 * cost.fixed_bytes + 4 * cost.working_bytes
    compute_s = cost.flops / (SHARE_OF_PEAK * generation.peak_flops_s)
    return compute_s + moved_bytes / generation.hbm_bytes_s


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
