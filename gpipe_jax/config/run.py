"""Define the whole configuration of a run, and the rules between its sections."""

from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic import ValidationError as PydanticError

from gpipe_jax.config.base import (
    Count,
    CountOrZero,
    Depth,
    Positive,
    PositiveOrZero,
    Section,
    Text,
    cross_check,
)
from gpipe_jax.config.data import ArraysConfig, DataConfig, data_problems
from gpipe_jax.config.models import ModelConfig
from gpipe_jax.config.optimizers import AdamConfig, AnyOptimizerConfig
from gpipe_jax.schedules.generators import CHUNKED_TRAINING, TRAINING
from gpipe_jax.utils import choices
from gpipe_jax.utils.text import GIB, batch_problem

if TYPE_CHECKING:
    ScheduleName = RematName = KeysPerName = str
else:
    ScheduleName = Literal[tuple(TRAINING)]
    RematName = Literal[choices.REMAT]
    KeysPerName = Literal[choices.KEYS_PER]


class MeshConfig(Section):
    """How many devices a run uses: stages x data of them."""

    stages: Count = Field(
        default=1,
        description="devices in the pipeline, each with one stage of the network, or "
        "pipeline.chunks of them",
    )
    data: Count = Field(
        default=1, description="replicas of the pipeline, each with a part of the batch"
    )
    simulate: Count | None = Field(
        default=None,
        lt=1025,
        description="number of CPU devices to simulate, for a machine without accelerators",
    )


class PipelineConfig(Section):
    """How a batch goes through the stages."""

    micro_batches: Count = Field(default=1, description="parts that a replica cuts its batch into")
    schedule: ScheduleName = Field(
        default="1f1b", description="order of the work"
    )
    chunks: Depth = Field(
        default=1,
        description="stages of the network on each device; more than one with interleaved only",
    )
    partition: Literal["auto"] | tuple[Count, ...] = Field(
        default="auto",
        description="auto (balanced cost), or the index of the first layer of every stage but the "
        "first",
    )
    cost: Literal["flops", "time"] | tuple[PositiveOrZero, ...] = Field(
        default="flops",
        description="what auto balances, and what a cut is said to cost: flops, measured time, or "
        "a cost for each layer",
    )
    memory_limit_gib: Positive | None = Field(
        default=None,
        description="memory of a device in GiB; auto keeps each stage below it, "
        "and takes the optimizer for one of two slots a parameter",
    )
    remat: RematName = Field(
        default="stage", description="what the backward pass recomputes at a time"
    )
    keys_per: KeysPerName = Field(
        default="micro_batch",
        description="what has randomness of its own; with example dropout does not depend on "
        "micro_batches and mesh.data",
    )

    @property
    def memory_limit(self) -> float | None:
        """The same in bytes."""
        return None if self.memory_limit_gib is None else self.memory_limit_gib * GIB

    @field_validator("chunks")
    @classmethod
    def _chunks_interleave(cls, chunks: int, info: ValidationInfo) -> int:
        schedule = info.data.get("schedule")  # missing if it is invalid
        if chunks > 1 and schedule not in (None, *CHUNKED_TRAINING):
            known = " or ".join(map(repr, CHUNKED_TRAINING))
            raise ValueError(
                f"chunks {chunks} need pipeline.schedule {known}, got {schedule!r}; "
                f"use that schedule, or one chunk"
            )
        return chunks

    @field_validator("partition")
    @classmethod
    def _boundaries_increase(cls, partition: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(partition, str):
            return partition
        for left, right in pairwise(partition):
            if left >= right:
                raise ValueError(
                    f"boundaries must be strictly increasing, got {right} after {left} "
                    f"in {list(partition)}"
                )
        return partition


class TrainConfig(Section):
    """How long a run is, and where it writes."""

    steps: Count = Field(default=1000, description="optimizer steps in all")
    eval_every: Count = Field(default=200, description="steps between evaluations")
    log_every: Count = Field(default=10, description="steps between lines of metrics")
    save_every: Count | None = Field(
        default=None, description="steps between checkpoints; default: as evaluations"
    )
    keep: Count = Field(default=2, description="newest checkpoints that are kept")
    keep_best: CountOrZero = Field(
        default=0, description="checkpoints of lowest held-out loss that are kept too"
    )
    seed: CountOrZero = Field(
        default=0, description="seed of parameters, dropout and the data's order"
    )
    writers: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="what else is told the metrics: tensorboard, wandb"
    )
    workdir: Text | None = Field(
        default=None, description="folder of the run; default: runs/<name of the config file>"
    )


class ProfileConfig(Section):
    """Steps that are traced with jax.profiler, into the folder of the run."""

    start: Count = Field(default=10, description="first step that is traced")
    steps: CountOrZero = Field(default=0, description="how many are; 0: none")


class Config(Section):
    """A whole run. `model` and `data` are required, the rest has defaults."""

    model: ModelConfig = Field(discriminator="kind", description="the network")
    data: DataConfig = Field(discriminator="kind", description="the data set")
    mesh: MeshConfig = Field(default=MeshConfig(), description="the devices")
    pipeline: PipelineConfig = Field(default=PipelineConfig(), description="the pipeline")
    optimizer: AnyOptimizerConfig = Field(
        default=AdamConfig(), discriminator="kind", description="the optimizer"
    )
    train: TrainConfig = Field(default=TrainConfig(), description="the run")
    profile: ProfileConfig = Field(default=ProfileConfig(), description="a trace of the run")

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        # One error each, with its own location, where a plain ValueError would give one for all.
        problems = [cross_check(name, message) for name, message in cross_checks(self)]
        if problems:
            raise PydanticError.from_exception_data("Config", problems)
        return self


def section_models(section: str, root: type[Section] = Config) -> dict[str, type[Section]]:
    """The models a section may have, by `kind`; by the empty string if it has no kinds."""
    annotation: Any = root.model_fields[section].annotation
    models = get_args(annotation) or (annotation,)
    return {
        kind: model
        for model in models
        for kind in (get_args(model.model_fields["kind"].annotation) if len(models) > 1 else [""])
    }


def cross_checks(config: Config) -> list[tuple[str, str]]:
    """Every rule between sections that `config` breaks: (dotted name, message)."""
    mesh, pipeline = config.mesh, config.pipeline
    devices = mesh.stages * mesh.data
    found: list[tuple[str, str]] = []
    batch = batch_problem(
        config.data.batch_size, replicas=mesh.data, micro_batches=pipeline.micro_batches
    )
    if batch:
        found.append(("data.batch_size", batch))
    if not isinstance(pipeline.partition, str):
        found += _boundary_problems(mesh.stages, pipeline.chunks, pipeline.partition)
    if mesh.simulate is not None and mesh.simulate < devices:
        message = (
            f"simulate {mesh.simulate} is less than stages x data = "
            f"{mesh.stages} x {mesh.data} = {devices}; raise it to {devices}"
        )
        found.append(("mesh.simulate", message))
    return found + data_problems(config.model, config.data)


def unused(config: Config) -> dict[str, str]:
    """Settings that do nothing, by dotted name, and the setting that says so.

    They are legal: one override of a file may leave others of its settings without effect.
    """
    found: dict[str, str] = {}
    schedule = config.optimizer.schedule
    if schedule != "exponential":
        names = [f"optimizer.{name}" for name in ("decay_rate", "decay_steps", "staircase")]
        found |= dict.fromkeys(names, f"optimizer.schedule {schedule}")
    if isinstance(config.data, ArraysConfig) and config.data.test is not None:
        found["data.test_fraction"] = f"data.test {config.data.test}"
    if config.profile.steps == 0:
        found["profile.start"] = "profile.steps 0"
    return found


def _boundary_problems(
    devices: int, chunks: int, boundaries: tuple[int, ...]
) -> list[tuple[str, str]]:
    need = devices * chunks - 1
    if len(boundaries) == need:
        return []
    stages = f"{devices}" if chunks == 1 else f"{devices} x pipeline.chunks {chunks}"
    message = (
        f"mesh.stages {stages} needs {need} boundaries, got {len(boundaries)}: "
        f"{list(boundaries)}; give {need}, or 'auto'"
    )
    return [("pipeline.partition", message)]
