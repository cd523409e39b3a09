"""What is to be trained, and how it could be laid out on devices: each pair is a program."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax

from gpipe_jax.config.run import Config
from gpipe_jax.distributed.mesh import abstract_mesh
from gpipe_jax.errors import section
from gpipe_jax.layers.layer import Layer
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.training import from_config as build
from gpipe_jax.training import optimizers
from gpipe_jax.training.trainer import Trainer


class Layout(NamedTuple):
    """What a plan may choose; it changes no result, but time and memory."""

    stages: int = 1
    data: int = 1
    micro_batches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    remat: str = "stage"
    partition: Any = "auto"

    def __str__(self) -> str:
        chunks = f", V {self.chunks}" if self.chunks > 1 else ""
        sizes = f"K {self.stages}, D {self.data}, M {self.micro_batches}{chunks}"
        return f"{sizes}, {self.schedule}, remat {self.remat}"


class Job(NamedTuple):
    """What is trained, whatever the layout."""

    layers: Sequence[Layer]
    loss: Callable
    example: dict  # a batch, or its shapes
    tx: optax.GradientTransformation
    ema: float | None = None
    steps: int | None = None
    keys_per: str = "micro_batch"
    memory_limit: float | None = None  # bytes of a device that the partition keeps within

    def trainer(self, layout: Layout, cost: Any = "flops") -> Trainer:
        """The training of this job so laid out, on devices that are nowhere."""
        mesh = abstract_mesh(stages=layout.stages, data=layout.data)
        pipe = Pipeline(
            self.layers,
            loss=self.loss,
            mesh=mesh,
            example=self.example,
            steps=self.steps,
            keys_per=self.keys_per,
            memory_limit=self.memory_limit,
            cost=cost,
            **{k: v for k, v in layout._asdict().items() if k not in ("stages", "data")},
        )
        return Trainer(pipe, self.tx, ema=self.ema)


def from_config(config: Config) -> tuple[Job, Layout]:
    """The job and the layout that a config describes; reads no data. Raises `SectionError`."""
    with section("data"):
        example = build.example(config)
    with section("model"):
        layers, loss = build.network(config.model), build.loss(config.model)
    with section("optimizer"):
        tx = optimizers.build(config.optimizer, config.train.steps)
    pipeline = config.pipeline
    job = Job(
        layers,
        loss,
        example,
        tx,
        ema=config.optimizer.ema,
        steps=config.train.steps,
        keys_per=pipeline.keys_per,
        memory_limit=pipeline.memory_limit,
    )
    chosen = {name: getattr(pipeline, name) for name in Layout._fields if hasattr(pipeline, name)}
    return job, Layout(stages=config.mesh.stages, data=config.mesh.data, **chosen)
