"""Plan files: written by `gpipe plan --out`, and followed by `gpipe train --plan`."""

import json
from collections.abc import Sequence
from pathlib import Path

from gpipe_jax.config import loader
from gpipe_jax.config.run import Config
from gpipe_jax.errors import ConfigError
from gpipe_jax.planner.plan import Plan

# What a plan chooses, by its name in a config.
SETTINGS = {
    "stages": "mesh.stages",
    "data": "mesh.data",
    "micro_batches": "pipeline.micro_batches",
    "schedule": "pipeline.schedule",
    "chunks": "pipeline.chunks",
    "remat": "pipeline.remat",
    "partition": "pipeline.partition",
}
CHOSEN = (*SETTINGS.values(), "mesh.simulate", "pipeline.cost", "train.", "pipeline.memory_limit")


def save(plan: Plan, path: Path) -> None:
    """Write a plan of a config; OSError if that can't be done."""
    path.write_text(json.dumps(plan.to_dict(), indent=2) + "\n", encoding="utf-8")


def step_time_s(path: Path) -> float | None:
    """The time of a step that a plan file predicts, if it does; the file must be one."""
    return json.loads(path.read_text(encoding="utf-8"))["step_time_s"]


def overrides(path: Path, source: str, given: Sequence[str]) -> list[str]:
    """`given`, and before them the overrides that lay the run of config `source` out as planned.

    ConfigError if the file is no plan, or one that was made for another config.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        planned = Config.model_validate(found["config"])
        layout = {**found["layout"], "partition": found["layout"]["partition"] or "auto"}
        chosen = [f"{name}={json.dumps(layout[k])}" for k, name in SETTINGS.items()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"cannot be read as a plan ({reason}); write one with gpipe plan ... --out FILE"
        raise ConfigError([problem], str(path)) from error
    config = loader.load(source, given)
    lines = loader.compare(planned, config)
    different = [line for line in lines if not line.startswith(CHOSEN)]
    if different:
        rule = f"this plan was made for another config than {source}; make one for it"
        raise ConfigError([rule, *different], str(path))
    return [*chosen, *given]
