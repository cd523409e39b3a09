"""Define the whole configuration of a run, and the rules between its sections."""

from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator

from gpipe_jax.config.base import (
    AnyPath,
    Configuration,
    Count,
    CountOrZero,
    Depth,
    LocalPath,
    Mark,
    NamedCode,
    Positive,
    PositiveOrZero,
    Problems,
    Section,
)
from gpipe_jax.config.calls import CallItem, MetricItem
from gpipe_jax.config.data import AnyDataConfig, DataConfig, model_reads_data
from gpipe_jax.config.losses import AnyLossConfig, ModelLossConfig
from gpipe_jax.config.models import AnyModelConfig
from gpipe_jax.config.optimizers import REFUSED, AdamConfig, AnyOptimizerConfig
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
    """Set how many devices a run uses: stages x data."""

    stages: Annotated[Count, Mark.LAYOUT] = Field(
        default=1,
        description="devices in the pipeline, each with one stage of the network, or "
        "pipeline.chunks of them",
    )
    data: Annotated[Count, Mark.LAYOUT] = Field(
        default=1, description="replicas of the pipeline, each with a part of the batch"
    )
    simulate: Annotated[Count | None, Mark.OPERATION] = Field(
        default=None,
        lt=1025,
        description="number of CPU devices to simulate, for a machine without accelerators",
    )


class PipelineConfig(Section):
    """Set how a batch passes through the stages."""

    micro_batches: Annotated[Count, Mark.LAYOUT] = Field(
        default=1, description="parts that a replica cuts its batch into"
    )
    schedule: Annotated[ScheduleName, Mark.LAYOUT] = Field(
        default="1f1b", description="order of the work"
    )
    chunks: Annotated[Depth, Mark.LAYOUT] = Field(
        default=1,
        description="stages of the network on each device; more than one with interleaved only",
    )
    partition: Annotated[Literal["auto"] | tuple[Count, ...], Mark.LAYOUT] = Field(
        default="auto",
        description="auto (balanced cost), or the index of the first layer of every stage but the "
        "first",
    )
    cost: Annotated[Literal["flops", "time"] | tuple[PositiveOrZero, ...], Mark.OPERATION] = Field(
        default="flops",
        description="the cost of a layer, which auto balances and reports show: flops, measured "
        "time, or a number for each layer",
    )
    memory_limit_gib: Annotated[Positive | None, Mark.OPERATION] = Field(
        default=None,
        description="memory of a device in GiB; auto keeps each stage below it, "
        "and assumes an optimizer with two numbers per parameter",
    )
    remat: Annotated[RematName, Mark.LAYOUT] = Field(
        default="stage", description="what the backward pass recomputes at a time"
    )
    keys_per: KeysPerName = Field(
        default="micro_batch",
        description="the unit that gets its own random numbers; with example, dropout does not "
        "depend on micro_batches and mesh.data",
    )

    @property
    def memory_limit(self) -> float | None:
        """Return the memory limit in bytes."""
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


PLACES = {
    "memory_limit": "pipeline.memory_limit_gib",
    "loss": "loss.kind",
    "metrics": "train.metrics",
    "trainable": "model.trainable",
    "frozen": "model.frozen",
}
"""Name the settings of a `Pipeline`'s arguments that the section `pipeline` does not have."""


class TrainConfig(Section):
    """Set how long a run is, and where it writes."""

    steps: Annotated[Count, Mark.LENGTH] = Field(default=1000, description="optimizer steps in all")
    eval_every: Annotated[Count, Mark.OPERATION] = Field(
        default=200, description="steps between evaluations"
    )
    log_every: Annotated[Count, Mark.OPERATION] = Field(
        default=10, description="steps between lines of metrics"
    )
    save_every: Annotated[Count | None, Mark.OPERATION] = Field(
        default=None, description="steps between checkpoints; default: as evaluations"
    )
    keep: Annotated[Count, Mark.OPERATION] = Field(
        default=2, description="newest checkpoints that are kept"
    )
    keep_best: Annotated[CountOrZero, Mark.OPERATION] = Field(
        default=0, description="checkpoints of lowest held-out loss that are kept too"
    )
    seed: Annotated[CountOrZero, Mark.LENGTH] = Field(
        default=0, description="seed of parameters, dropout and the data's order"
    )
    init_from: Annotated[AnyPath | None, Mark.LENGTH] = Field(
        default=None,
        description="folder of a run, a checkpoint or an exported file, whose parameters a new run "
        "starts with, where names and shapes match; a resumed run does not read it",
    )
    metrics: Annotated[tuple[MetricItem, ...], Mark.OPERATION] = Field(
        default=(),
        description="further metrics, as module:function or {function: ..., arguments: {...}, "
        "name: ...}; each is called with outputs and labels and returns a number for each example",
    )
    callbacks: Annotated[tuple[CallItem, ...], Mark.OPERATION] = Field(
        default=(),
        description="what is called with the record of each step, and of each evaluation; if it "
        "returns true, the run ends",
    )
    writers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Mark.OPERATION] = Field(
        default=(), description="where else the metrics are written: tensorboard, wandb"
    )
    workdir: Annotated[AnyPath | None, Mark.OPERATION] = Field(
        default=None,
        description="folder of the run, also gs://; default: runs/<name of the config file>",
    )
    code: Annotated[LocalPath | None, Mark.OPERATION] = Field(
        default=None,
        description="folder of the Python files that the config names, before the current folder; "
        "default: that of the config file",
    )

    @field_validator("metrics")
    @classmethod
    def _names_differ(cls, metrics: tuple[MetricItem, ...]) -> tuple[MetricItem, ...]:
        names = [metric.label for metric in metrics]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{names.count(name)} metrics are called {name!r}, and a record has one of "
                    f"each name; give them names, as {{function: ..., name: ...}}"
                )
        return metrics

    def named_code(self) -> list[NamedCode]:
        return [
            NamedCode(field, call.function, call.arguments)
            for field, calls in (("metrics", self.metrics), ("callbacks", self.callbacks))
            for call in calls
        ]


class ProfileConfig(Section):
    """Trace steps with jax.profiler, into the folder of the run."""

    start: Annotated[Count, Mark.OPERATION] = Field(
        default=10, description="first step that is traced"
    )
    steps: Annotated[CountOrZero, Mark.OPERATION] = Field(
        default=0, description="number of steps that are traced; 0: none"
    )

    def unused(self) -> dict[str, str]:
        return {"start": "steps 0"} if self.steps == 0 else {}


def _batch_splits(data: DataConfig, mesh: MeshConfig, pipeline: PipelineConfig) -> Problems:
    problem = batch_problem(
        data.batch_size, replicas=mesh.data, micro_batches=pipeline.micro_batches
    )
    return [("data.batch_size", problem)] if problem else []


def _every_stage_has_layers(mesh: MeshConfig, pipeline: PipelineConfig) -> Problems:
    boundaries, chunks = pipeline.partition, pipeline.chunks
    expected = mesh.stages * chunks - 1
    if isinstance(boundaries, str) or len(boundaries) == expected:
        return []
    stages = f"{mesh.stages}" if chunks == 1 else f"{mesh.stages} x pipeline.chunks {chunks}"
    message = (
        f"mesh.stages {stages} needs {expected} boundaries, got {len(boundaries)}: "
        f"{list(boundaries)}; give {expected}, or 'auto'"
    )
    return [("pipeline.partition", message)]


def _enough_simulated_devices(mesh: MeshConfig) -> Problems:
    devices = mesh.stages * mesh.data
    if mesh.simulate is None or mesh.simulate >= devices:
        return []
    message = (
        f"simulate {mesh.simulate} is less than stages x data = "
        f"{mesh.stages} x {mesh.data} = {devices}; raise it to {devices}"
    )
    return [("mesh.simulate", message)]


class Config(Configuration):
    """Configure a whole run; immutable, with one section for each aspect.

    `load` makes one from a file, a dict and overrides. `model` and `data` are required, all other
    sections have defaults. Invalid values raise `pydantic.ValidationError`; `load` turns it into a
    `ConfigError` whose lines have places.

    Attributes:
        model: The network: kind and sizes.
        data: The data set: kind, batch size, files.
        loss: The loss: kind and settings.
        mesh: The devices: stages x data.
        pipeline: Micro-batches, schedule, partition, recomputation.
        optimizer: Kind, learning rate, decay.
        train: Steps, evaluations, checkpoints, seed, folder.
        profile: Steps to trace.

    Example::

        config = gpipe.load({"model": {"kind": "mlp"}, "data": {"kind": "digits"}})
        assert config.mesh.stages == 1
    """

    refused = {f"optimizer.kind={name}": reason for name, reason in REFUSED.items()}  # noqa: RUF012
    rules = (
        _batch_splits,
        _every_stage_has_layers,
        _enough_simulated_devices,
        model_reads_data,
    )

    model: AnyModelConfig = Field(discriminator="kind", description="the network")
    data: AnyDataConfig = Field(discriminator="kind", description="the data set")
    loss: AnyLossConfig = Field(
        default=ModelLossConfig(), discriminator="kind", description="the loss"
    )
    mesh: MeshConfig = Field(default=MeshConfig(), description="the devices")
    pipeline: PipelineConfig = Field(default=PipelineConfig(), description="the pipeline")
    optimizer: AnyOptimizerConfig = Field(
        default=AdamConfig(), discriminator="kind", description="the optimizer"
    )
    train: TrainConfig = Field(default=TrainConfig(), description="the run")
    profile: ProfileConfig = Field(default=ProfileConfig(), description="a trace of the run")


def section_models(section: str, root: type[Configuration] = Config) -> dict[str, type[Section]]:
    """Return the classes that a section may have, by `kind`; by "" if it has no kinds."""
    annotation: Any = root.model_fields[section].annotation
    models = get_args(annotation) or (annotation,)
    if len(models) == 1:
        return {"": models[0]}
    return {
        kind: model for model in models for kind in get_args(model.model_fields["kind"].annotation)
    }


def marks(root: type[Configuration] = Config) -> dict[str, Mark | None]:
    """Return the mark of each setting, by dotted name; of all kinds of its section together."""
    return {
        f"{section}.{field}": model.mark(field)
        for section in root.model_fields
        for model in section_models(section, root).values()
        for field in model.model_fields
    }


def layout(config: Config) -> dict[str, Any]:
    """Return the settings that a plan chooses, by dotted name, as they are in `config`."""
    return {
        f"{name}.{field}": getattr(section, field)
        for name, section in config
        for field in type(section).model_fields
        if section.mark(field) is Mark.LAYOUT
    }


def unused(config: Configuration) -> dict[str, str]:
    """Return settings without effect: {dotted name: the setting that is why}."""
    return {
        f"{name}.{field}": f"{name}.{reason}"
        for name, section in config
        for field, reason in section.unused().items()
    }


def calls(config: Configuration) -> list[NamedCode]:
    """Return the code that a config names; each field is a dotted name."""
    return [
        code._replace(field=f"{name}.{code.field}")
        for name, section in config
        for code in section.named_code()
    ]
