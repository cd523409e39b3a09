"""Describe a training (a job) and its placement on devices (a layout)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax

from gpipe_jax.config.base import section
from gpipe_jax.config.run import PLACES, Config, layout
from gpipe_jax.distributed.mesh import abstract_mesh
from gpipe_jax.layers.layer import Layer
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.training import from_config as build
from gpipe_jax.training import optimizers
from gpipe_jax.training.trainer import Trainer


class Layout(NamedTuple):
    """Hold the settings that a plan may choose: they change time and memory, but no result."""

    stages: int = 1  # K, devices along the stage axis
    data: int = 1  # D, replicas
    micro_batches: int = 1  # M
    schedule: str = "1f1b"
    chunks: int = 1  # V, stages on each device
    remat: str = "stage"
    partition: Any = "auto"  # or the first layer of each stage but the first

    def __str__(self) -> str:
        chunks = f", V {self.chunks}" if self.chunks > 1 else ""
        sizes = f"K {self.stages}, D {self.data}, M {self.micro_batches}{chunks}"
        return f"{sizes}, {self.schedule}, remat {self.remat}"


class Job(NamedTuple):
    """Hold the network and its training, independently of the layout."""

    layers: Sequence[Layer]
    loss: Callable
    example: dict  # a batch, or its shapes
    tx: optax.GradientTransformation
    ema: float | None = None
    steps: int | None = None
    keys_per: str = "micro_batch"
    memory_limit: float | None = None  # bytes of a device that the partition must not exceed
    trainable: Sequence[str] | None = None  # patterns of the parameters to train
    frozen: Sequence[str] | None = None  # or of those not to train
    cost: Any = None  # what `gpipe train` balances; None if that is not known
    simulated: bool = False  # whether `gpipe train` uses simulated CPU devices

    def build_trainer(self, layout: Layout, cost: Any = "flops", platform: str = "tpu") -> Trainer:
        """Return the training of this job in a layout, on an abstract mesh (no devices)."""
        return Trainer(self.build_pipeline(layout, cost, platform), self.tx, ema=self.ema)

    def build_pipeline(
        self, layout: Layout, cost: Any = "flops", platform: str = "tpu"
    ) -> Pipeline:
        """Return the pipeline of `build_trainer`."""
        options = layout._asdict()
        mesh = abstract_mesh(stages=options.pop("stages"), data=options.pop("data"))
        return Pipeline(
            self.layers,
            loss=self.loss,
            mesh=mesh,
            example=self.example,
            steps=self.steps,
            keys_per=self.keys_per,
            memory_limit=self.memory_limit,
            trainable=self.trainable,
            frozen=self.frozen,
            cost=cost,
            platform=platform,
            **options,  # the others have the same names
        )


def from_config(config: Config) -> tuple[Job, Layout]:
    """Return the job and the layout of a config; read no data. Raises `SectionError`."""
    with section("data", file_field=config.data.file_field):
        example = build.example(config)
    with section("model"):
        layers = build.network(config.model, config.train.code)
    loss = build.loss_of(config)
    pipeline, chosen = config.pipeline, config.optimizer
    job = Job(
        layers,
        loss,
        example,
        optax.identity(),
        ema=chosen.ema,
        steps=config.train.steps,
        keys_per=pipeline.keys_per,
        memory_limit=pipeline.memory_limit,
        **config.model.training_arguments,
        cost=pipeline.cost,
        simulated=config.mesh.simulate is not None,
    )
    with section("pipeline", **PLACES):
        # Groups of the optimizer are for parameters that the network names.
        alone = job._replace(memory_limit=None).build_pipeline(Layout()) if chosen.groups else None
    with section("optimizer"):
        shapes = alone.shapes if alone else ()
        tx = optimizers.build(chosen, config.train.steps, config.train.code, shapes)
    job = job._replace(tx=tx)
    settings = {name.partition(".")[2]: value for name, value in layout(config).items()}
    return job, Layout(**settings)
