"""Warn where a training of the same config would be cut into other stages than the plan."""

from typing import Any

from gpipe_jax.partition import costs
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.planner.job import Job, Layout


def warnings(pipe: Pipeline, job: Job, layout: Layout, cost: Any, *, compiled: bool) -> list[str]:
    """Return a warning for each way to train that would cut elsewhere, with both cuts.

    Args:
        pipe: The planned pipeline.
        job: The job. If it has no cost, it is not known how it would be trained.
        layout: The layout as requested.
        cost: What the plan balances.
        compiled: Whether the plan is for a TPU slice; if not, it may be of a training on CPU.
    """
    if layout.partition != "auto" or job.cost in (None, "time"):
        return []
    trainings = {}
    if cost != job.cost:
        trainings["gpipe train"] = "cpu" if job.simulated and not compiled else "tpu"
    if job.simulated == compiled:  # the plan counts operations for TPU
        trainings["gpipe train on CPU devices"] = "cpu"
    planned, found = list(pipe.partition.boundaries), []
    for name, platform in trainings.items():
        cut = list(pipe.cut_on(platform, job.cost))
        if cut != planned:
            found.append(
                f"{name} cuts before layers {cut}, this plan before {planned}, because training "
                f"balances {costs.describe(job.cost, platform)}, and the plan {pipe.cost_kind}; "
                f"pipeline.partition={planned}, or gpipe plan --out FILE and then gpipe train "
                f"--plan FILE, trains with the cut of this plan"
            )
    return found
