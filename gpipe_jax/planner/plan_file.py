"""Write plan files (`gpipe plan --out`), and read them as overrides (`gpipe train --plan`)."""

import json
from collections.abc import Sequence
from pathlib import Path

from gpipe_jax.config import loader
from gpipe_jax.config.base import Mark
from gpipe_jax.config.run import Config, marks
from gpipe_jax.errors import ConfigError
from gpipe_jax.planner.plan import Plan

# Settings that a plan chooses: the name in a config, by the name in a layout.
SETTINGS = {name.partition(".")[2]: name for name, mark in marks().items() if mark is Mark.LAYOUT}


def save(plan: Plan, path: Path) -> None:
    """Write a plan of a config; raise OSError if the file cannot be written."""
    path.write_text(json.dumps(plan.to_dict(), indent=2) + "\n", encoding="utf-8")


def step_time_s(path: Path) -> float | None:
    """Return the step time that a valid plan file predicts, or None if it predicts none."""
    return json.loads(path.read_text(encoding="utf-8")).get("step_time_s")


def overrides(path: Path, source: str, given: Sequence[str]) -> list[str]:
    """Return `given`, and before them the overrides that give a run the layout of a plan.

    Args:
        path: The plan file.
        source: The config of the run.
        given: The user's own overrides.

    Raises:
        ConfigError: The file is not a plan, or a plan for another config.
    """
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        planned = Config.model_validate(plan["config"])
        layout = {**plan["layout"], "partition": plan["layout"]["partition"] or "auto"}
        chosen = [f"{name}={json.dumps(layout[k])}" for k, name in SETTINGS.items()]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        problem = f"cannot be read as a plan ({reason}); write one with gpipe plan ... --out FILE"
        raise ConfigError([problem], str(path)) from error
    config = loader.load(source, given)
    # A plan is for the settings without a mark. Of those with a mark, LAYOUT is chosen by the plan
    # (or by the user, whose overrides win), OPERATION is about how a run is done (writers, profile,
    # folder), and LENGTH changes neither time nor memory of a step.
    free = {name for name, mark in marks().items() if mark}
    differences = loader.compare(planned, config)
    different = {name: pair for name, pair in differences.items() if name not in free}
    if different:
        rule = f"this plan was made for another config than {source}; run gpipe plan for this one"
        raise ConfigError([rule, *loader.describe_differences(different)], str(path))
    return [*chosen, *given]
