"""Build what a config describes: data set, network, loss, mesh, pipeline and optimizer."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from gpipe_jax import data, losses, zoo
from gpipe_jax.config.base import section
from gpipe_jax.config.data import example_rules
from gpipe_jax.config.models import ModelConfig
from gpipe_jax.config.run import Config
from gpipe_jax.data import stream
from gpipe_jax.distributed.mesh import make_mesh, simulate_devices
from gpipe_jax.distributed.processes import close_in_all, same_in_all
from gpipe_jax.errors import ArgumentError, DataError
from gpipe_jax.layers.layer import Layer
from gpipe_jax.pipeline import micro_batches
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.run_folder.folder import CHECKPOINTS
from gpipe_jax.training import optimizers, resume, writers
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils import paths
from gpipe_jax.utils.text import format_bytes
from gpipe_jax.utils.trees import tree_bytes

# --- one section ----------------------------------------------------------------------------------


def dataset(config: Config) -> data.Dataset:
    """Return the data set of a config."""
    if not config.data.in_files:
        _check_memory(config)
    arguments = config.data.dataset_arguments(config.model)
    return data.DATASETS[config.data.kind](seed=config.train.seed, **arguments)


def _check_memory(config: Config) -> None:
    """Refuse a batch that this machine cannot hold: it would end the process without a message."""
    need = tree_bytes(example(config))
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ArgumentError(
            "batch_size",
            f"`batch_size` {config.data.batch_size} takes {format_bytes(need)}, and this machine "
            f"has {format_bytes(have)} of memory; use a smaller batch",
        )


def example(config: Config) -> dict:
    """Return the shapes of a batch; of a data set in files, read one batch for them."""
    if config.data.in_files:
        first = next(dataset(config).train(0))
        return {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in first.items()}
    count, images = config.data.batch_size, config.data.images()
    if images is None:
        tokens = jax.ShapeDtypeStruct((count, config.model.sequence_length), np.int32)
        return {"inputs": tokens, "labels": tokens}
    inputs = jax.ShapeDtypeStruct((count, images.size, images.size, images.channels), np.float32)
    return {"inputs": inputs, "labels": jax.ShapeDtypeStruct((count,), np.int32)}


def network(model: ModelConfig) -> list[Layer]:
    """Return the layers of a config's model."""
    return zoo.MODELS[model.kind](**model.network_arguments())


def loss(model: ModelConfig) -> Callable:
    """Return the loss function of a config's model."""
    if model.reads_tokens:
        return losses.softmax_cross_entropy
    return losses.classification(**model.loss_arguments())


# --- everything -----------------------------------------------------------------------------------


class Assembly(NamedTuple):
    """Hold everything that a run needs."""

    config: Config
    workdir: epath.Path
    dataset: data.Dataset
    trainer: Trainer
    data_identity: dict  # of the data set, as `stream.fingerprint` describes it

    @property
    def checkpoints(self) -> epath.Path:
        """Return the folder of the run's checkpoints."""
        return self.workdir / CHECKPOINTS


def assemble(config: Config, workdir: epath.PathLike, processes: int = 1) -> Assembly:
    """Build data, network, mesh, pipeline and optimizer of a config; train nothing.

    Args:
        config: The configuration.
        workdir: The folder of the run, also with `~` or environment variables; nothing is written
            yet.
        processes: Number of processes that share the simulated devices.

    Raises:
        SectionError: A section cannot be realized here. Until the first step, any mistake is one of
            the config.
    """
    with section("train"):
        folder = paths.anywhere("workdir", workdir)
    if config.mesh.simulate:
        with section("mesh"):
            simulate_devices(_devices_per_process(config.mesh.simulate, processes))
    with section("train"):
        writers.check(config.train.writers)
    with section("data", file_field=config.data.file_field):
        batches = dataset(config)
        first = next(batches.train(0))
    with section("model"):
        layers, loss_function = network(config.model), loss(config.model)
    with section("mesh"):
        mesh = make_mesh(stages=config.mesh.stages, data=config.mesh.data)
    with section("pipeline", memory_limit="memory_limit_gib"):
        options = config.pipeline.model_dump(exclude={"memory_limit_gib"})
        if cut := resume.measured_cut(config, folder / CHECKPOINTS):
            options["partition"] = cut
        pipe = Pipeline(
            layers,
            loss=loss_function,
            mesh=mesh,
            example=first,
            steps=config.train.steps,
            memory_limit=config.pipeline.memory_limit,
            **options,
        )
    if config.data.in_files:
        with section("data", file_field=config.data.file_field):
            rules = example_rules(config.model)
            _check_data(batches, first, pipe, rules)
            batches = _checked(batches, rules)
    with section("optimizer"):
        tx = optimizers.build(config.optimizer, config.train.steps)
    # With this optimizer, a device may need more than the memory limit.
    with section("pipeline", memory_limit="memory_limit_gib"):
        trainer = Trainer(pipe, tx, ema=config.optimizer.ema)
    identity = stream.fingerprint(batches, first)
    return Assembly(config, folder, batches, trainer, identity)


def _check_data(dataset: data.Dataset, first: dict, pipe: Pipeline, rules: data.Rules) -> None:
    """Raise DataError for what the first step, or the first evaluation, would find later."""
    held_out = next(iter(dataset.test()), None)
    if held_out is None:
        raise DataError(f"the held-out data of {dataset.name} has no examples; give some")
    micro_batches.split(held_out, pipe.example, pipe.micro_batches)
    rules.check(f"the first training batch of {dataset.name}", first)
    rules.check(f"the first held-out batch of {dataset.name}", held_out)


def _checked(dataset: data.Dataset, rules: data.Rules) -> data.Dataset:
    """Return the data set with a check of every batch: a wrong label would only give a NaN."""

    def train(start: int, rows: np.ndarray | None = None) -> Iterator[dict]:
        for step, batch in enumerate(dataset.train(start, rows), start + 1):
            rules.check(f"the training batch of step {step} of {dataset.name}", batch)
            yield batch

    def test() -> Iterator[dict]:
        for number, batch in enumerate(dataset.test(), 1):
            rules.check(f"held-out batch {number} of {dataset.name}", batch)
            yield batch

    return dataclasses.replace(dataset, train=train, test=test)


def check_same_inputs(dataset: data.Dataset) -> None:
    """Raise DataError unless all processes read the same inputs; every one must call this.

    It compares the first batches, which are as much as all of them know at the start.
    """
    if jax.process_count() == 1:
        return
    batches = {"training": next(dataset.train(0)), "held-out": next(iter(dataset.test()), None)}
    for kind, batch in batches.items():
        shapes = {} if batch is None else {name: np.shape(a) for name, a in batch.items()}
        if not same_in_all(str(shapes)) or (
            batch is not None and not close_in_all(*stream.sketch(batch))
        ):
            raise DataError(
                f"the first {kind} batch of {dataset.name} is not the same on all hosts; give "
                f"every host the same data"
            )


def _devices_per_process(simulated: int, processes: int) -> int:
    if simulated % processes:
        raise ArgumentError(
            "simulate",
            f"`simulate` {simulated} devices do not split over {processes} processes; use a "
            f"multiple of {processes}",
        )
    return simulated // processes
