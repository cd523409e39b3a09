"""Looking for the best layout: all are analysed, the few best compiled."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax

from gpipe_jax.partition import solver
from gpipe_jax.partition.costs import NOMINAL_RATES, LayerCost
from gpipe_jax.pipeline import memory, remat
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.ragged.stages import Stages
from gpipe_jax.planner import predict, step_time
from gpipe_jax.planner.job import Job, Layout
from gpipe_jax.planner.plan import Plan
from gpipe_jax.planner.predict import Compiling
from gpipe_jax.schedules.generators import CHUNKED_TRAINING, TRAINING, make
from gpipe_jax.tpu_compiler.topologies import Generation, Topology
from gpipe_jax.utils import text
from gpipe_jax.utils.text import GIB
from gpipe_jax.utils.trees import tree_bytes

CHUNKS = (2, 4)  # of the interleaved schedule
MOST_TRIED = 3  # times as many are compiled at most, if some do not fit after all
SHARE_OF_PEAK = 0.5  # what compiled layers reach of it, about; only the ranking depends on it


class Candidate(NamedTuple):
    """A layout, as analysed."""

    layout: Layout
    boundaries: tuple[int, ...]  # the cut that was analysed
    needed_gib: float
    step_s: float


class Ranking(NamedTuple):
    """Compiled plans, the fastest that fits first; and how many layouts were looked at."""

    plans: list[Plan]
    looked_at: int
    too_large: int

    def __str__(self) -> str:
        head = ("", "stages", "data", "micro-batches", "chunks", "schedule", "remat", "fits",
                "GiB", "step", "examples/s")  # fmt: skip
        rows = [head, *(self._row(n, p) for n, p in enumerate(self.plans, 1))]
        looked = f"{self.looked_at} layouts analysed, {self.too_large} of them too large"
        return f"{text.text_table(rows)}\n{looked}; {len(self.plans)} compiled, not run"

    @staticmethod
    def _row(n: int, plan: Plan) -> tuple[str, ...]:
        chosen = plan.layout
        names = ("stages", "data", "micro_batches", "chunks", "schedule", "remat")
        fits = {True: "yes", False: "no", None: "unknown"}[plan.fits]
        figures = (f"{plan.hbm_needed_gib:.2f}", "unknown", "unknown")
        if plan.step_time_s is not None:
            figures = (figures[0], f"{plan.step_time_s:.4g} s", f"{plan.throughput:.4g}")
        return (str(n), *(str(chosen[name]) for name in names), fits, *figures)

    def to_dict(self) -> dict:
        """For JSON."""
        plans = [plan.to_dict() for plan in self.plans]
        return {"plans": plans, "looked_at": self.looked_at, "too_large": self.too_large}


def search(job: Job, compiling: Compiling, compile_best: int) -> Ranking:
    """Compile the best of all candidates that should fit; ValueError if none does."""
    if compile_best < 1:
        raise ValueError(f"`compile_best` must be at least 1, got {compile_best}")
    limit = compiling.topology.generation.hbm_gib
    found = list(candidates(job, compiling.topology))
    fitting = sorted((c for c in found if c.needed_gib <= limit), key=lambda c: c.step_s)
    if not fitting:
        raise ValueError(_nothing_fits(found, compiling.topology))
    plans: list[Plan] = []
    for candidate in fitting[: MOST_TRIED * compile_best]:
        layout = candidate.layout._replace(partition=list(candidate.boundaries))
        plans.append(predict.with_compiler(job, layout, compiling))
        if sum(plan.fits is True for plan in plans) == compile_best:
            break
    plans.sort(key=lambda p: (not p.fits, p.step_time_s or math.inf))
    return Ranking(plans, len(found), len(found) - len(fitting))


def _nothing_fits(found: list[Candidate], topology: Topology) -> str:
    if not found:
        return (
            f"the batch does not split over the {topology.devices} devices of {topology} in any "
            f"way; make it a multiple of some of their divisors"
        )
    least = min(found, key=lambda c: c.needed_gib)
    limit = topology.generation.hbm_gib
    return (
        f"no layout fits {topology}: the smallest, {least.layout}, needs {least.needed_gib:.2f} "
        f"GiB on each device, {least.needed_gib - limit:.2f} more than its {limit:.2f}; more "
        f"devices (more stages), a smaller batch, or bfloat16 activations would help"
    )


def candidates(job: Job, topology: Topology) -> Iterator[Candidate]:
    """Every legal layout on all devices; layer by layer only where a whole stage is too much."""
    count = jax.tree.leaves(job.example["inputs"])[0].shape[0]
    for size in _divisors(count):
        if size & (size - 1):  # other than powers of two are padded to one
            continue
        alone = _alone(job, size)
        for K in _divisors(topology.devices):
            D = topology.devices // K
            M, rest = divmod(count, D * size)
            if rest or not M or (topology.slices > 1 and K % topology.slices):
                continue
            for kind, V in _schedules(K, len(alone.shapes)):
                yield from _of_layout(job, alone, topology, Layout(K, D, M, kind, V))


def _schedules(K: int, layers: int) -> list[tuple[str, int]]:
    """(schedule, chunks) for K stages; alone on a device all are the same."""
    if layers < K:
        return []
    if K == 1:
        return [("1f1b", 1)]
    chunked = [(kind, V) for kind in CHUNKED_TRAINING for V in CHUNKS if layers >= K * V]
    return [*((kind, 1) for kind in TRAINING if kind not in CHUNKED_TRAINING), *chunked]


def _alone(job: Job, size: int) -> Pipeline:
    """The network on one device, with micro-batches of this size: shapes and costs."""
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), job.example)
    return job._replace(example=one).trainer(Layout()).pipe


def _of_layout(
    job: Job, alone: Pipeline, topology: Topology, layout: Layout
) -> Iterator[Candidate]:
    limit = topology.generation.hbm_gib
    for policy in remat.POLICIES:
        candidate = _analysed(job, alone, topology, layout._replace(remat=policy))
        yield candidate
        if candidate.needed_gib <= limit:
            return


def _analysed(job: Job, alone: Pipeline, topology: Topology, layout: Layout) -> Candidate:
    K, V, M = layout.stages, layout.chunks, layout.micro_batches
    backward = [_layer_s(c, topology.generation) for c in alone.costs]
    cut = solver.partition(backward, K * V)
    stages = Stages(alone.shapes, cut.layer_ranges, chunks=V, remat=remat.by_name(layout.remat))
    schedule = make(layout.schedule, K, M, V)
    slots = jax.eval_shape(job.tx.init, [storage.local_shapes() for storage in stages.params])
    held = memory.of_device(
        stages,
        alone.costs,
        schedule,
        optimizer_bytes=tree_bytes(slots) + stages.params.device_bytes() * (job.ema is not None),
        loss=alone.loss,
        micro_batch=alone.micro_batch_shapes,
    )
    whole = [sum(backward[i] for i in part) for part in cut.layer_ranges]
    third = [time / 3 for time in whole]  # a forward's part
    again = stages.remat.forwards - 1  # `whole` has one recomputation already
    whole = [time + again * forward for time, forward in zip(whole, third, strict=True)]
    times = step_time.stage_times(third, whole, stages.remat)
    generation = topology.generation
    update_s = 3 * memory.float32_bytes(stages) / generation.hbm_bytes_s
    step = step_time.step_time(
        stages, schedule, times, topology, replicas=layout.data, update_s=update_s
    )
    return Candidate(layout, cut.boundaries, sum(held.values()) / GIB, step.total)


def _layer_s(cost: LayerCost, generation: Generation) -> float:
    """A layer's backward, recomputation included, from its operations and its bytes."""
    operations = cost.compute_s * NOMINAL_RATES["tpu"][0]
    moved = 3 * cost.parameter_bytes + 4 * cost.working_bytes
    return operations / (SHARE_OF_PEAK * generation.peak_flops_s) + moved / generation.hbm_bytes_s


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
