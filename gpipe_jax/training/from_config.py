"""Build what a config describes: data set, network, loss, mesh, pipeline and optimizer."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from gpipe_jax import data, losses, own_code, zoo
from gpipe_jax.checkpoint import warm_start
from gpipe_jax.config.base import section
from gpipe_jax.config.data import ArraysConfig, PythonConfig, example_rules
from gpipe_jax.config.losses import ModelLossConfig, PythonLossConfig
from gpipe_jax.config.models import ModelConfig, PythonModelConfig
from gpipe_jax.config.run import PLACES, Config
from gpipe_jax.data import stream
from gpipe_jax.distributed.mesh import make_mesh, simulate_devices
from gpipe_jax.distributed.processes import close_in_all, is_first, same_in_all
from gpipe_jax.errors import ArgumentError, DataError
from gpipe_jax.layers.layer import Layer
from gpipe_jax.losses.further_metrics import with_metrics
from gpipe_jax.pipeline.batches import micro_batches
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.pipeline.state import TrainState
from gpipe_jax.run_folder.folder import CHECKPOINTS
from gpipe_jax.training import optimizers, resume, writers
from gpipe_jax.training.fitting.callbacks import Callback, NamedCallback
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils import paths
from gpipe_jax.utils.messages import say
from gpipe_jax.utils.text import format_bytes
from gpipe_jax.utils.trees import tree_bytes

# --- one section ----------------------------------------------------------------------------------


def dataset(config: Config) -> data.Dataset:
    """Return the data set of a config."""
    if not config.data.in_files:
        _check_memory(config)
    arguments = config.data.dataset_arguments(config.model)
    if isinstance(config.data, PythonConfig):
        arguments["folder"] = config.train.code
    elif isinstance(config.data, ArraysConfig):
        arguments["rules"] = example_rules(config.model, config.loss)
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
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), dict(first))
    count, images = config.data.batch_size, config.data.images()
    if images is None:
        tokens = jax.ShapeDtypeStruct((count, config.model.sequence_length), np.int32)
        return {"inputs": tokens, "labels": tokens}
    inputs = jax.ShapeDtypeStruct((count, images.size, images.size, images.channels), np.float32)
    return {"inputs": inputs, "labels": jax.ShapeDtypeStruct((count,), np.int32)}


def network(model: ModelConfig, folder: own_code.Folder = None) -> list[Layer]:
    """Return the layers of a config's model; `folder` has the user's own Python files."""
    if not isinstance(model, PythonModelConfig):
        return zoo.MODELS[model.kind](**model.network_arguments())
    layers = own_code.call(model.function, model.arguments, folder)
    if not isinstance(layers, list | tuple):
        raise ArgumentError(
            "function",
            f"`function` {model.function} returned a {type(layers).__name__}; it must return a "
            f"list of layers, each as gpipe_jax.layer(Module, ...) makes it",
        )
    return list(layers)


def loss(model: ModelConfig) -> Callable:
    """Return the loss function that goes with a config's model."""
    if model.reads_tokens:
        return losses.softmax_cross_entropy
    return losses.classification(**model.loss_arguments())


def loss_of(config: Config) -> Callable:
    """Return the loss function of a config, with the metrics that it names."""
    folder, chosen = config.train.code, config.loss
    if isinstance(chosen, ModelLossConfig):
        with section("model"):
            function = loss(config.model)
    else:
        with section("loss"):
            function = (
                _function(chosen.function, chosen.arguments, folder)
                if isinstance(chosen, PythonLossConfig)
                else losses.NAMES[chosen.kind](**chosen.loss_arguments())
            )
    with section("train", function="metrics", arguments="metrics"):
        further = {
            metric.label: _function(metric.function, metric.arguments, folder)
            for metric in config.train.metrics
        }
        return with_metrics(function, further) if further else function


def callbacks(config: Config) -> list[Callback]:
    """Return the functions that a run calls with its records."""
    with section("train", function="callbacks", arguments="callbacks"):
        return [
            NamedCallback(
                call.function,
                _function(call.function, call.arguments, config.train.code, ("a record",)),
            )
            for call in config.train.callbacks
        ]


def _function(
    reference: str,
    arguments: Mapping[str, Any],
    folder: own_code.Folder,
    positional: Sequence[str] = ("outputs", "labels"),
) -> Callable:
    """Return a function with its last arguments bound, or an object of a class."""
    function = own_code.find(reference, folder)
    if isinstance(function, type):
        return own_code.call(reference, arguments, folder)
    own_code.check_arguments(function, reference, arguments, positional=positional)
    return functools.partial(function, **arguments) if arguments else function


# --- everything -----------------------------------------------------------------------------------


class Assembly(NamedTuple):
    """Hold everything that a run needs."""

    config: Config
    workdir: epath.Path
    dataset: data.Dataset
    trainer: Trainer
    data_identity: dict  # of the data set, as `stream.fingerprint` describes it
    callbacks: Sequence[Callback] = ()

    @property
    def checkpoints(self) -> epath.Path:
        """Return the folder of the run's checkpoints."""
        return self.workdir / CHECKPOINTS

    def first_state(self) -> TrainState:
        """Return the state before the first step; `train.init_from` gives parameters.

        Raises:
            SectionError: Nothing in `train.init_from` can be used.
        """
        config, trainer = self.config.train, self.trainer
        if config.init_from is None:
            return trainer.init(config.seed)
        with section("train", file_field="init_from"):
            warm = warm_start.named(
                "init_from", trainer.pipe, config.init_from, seed=config.seed, rename={}
            )
        if is_first():
            say(f"train.init_from {config.init_from}: {warm}")
        return trainer.start(warm.state)


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
        layers = network(config.model, config.train.code)
    loss_function, record = loss_of(config), callbacks(config)
    with section("mesh"):
        mesh = make_mesh(stages=config.mesh.stages, data=config.mesh.data)
    with section("pipeline", **PLACES):
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
            **config.model.training_arguments,
            **options,
        )
    if config.data.in_files:
        with section("data", file_field=config.data.file_field):
            rules = _rules(config)
            _check_data(batches, first, pipe, rules)
            batches = _checked(batches, rules) if rules else batches
    with section("optimizer"):
        tx = optimizers.build(
            config.optimizer, config.train.steps, config.train.code, shapes=pipe.shapes
        )
    # With this optimizer, a device may need more than the memory limit.
    with section("pipeline", **PLACES):
        trainer = Trainer(pipe, tx, ema=config.optimizer.ema)
    identity = stream.fingerprint(batches, first)
    return Assembly(config, folder, batches, trainer, identity, record)


def _rules(config: Config) -> data.Rules | None:
    """Return what examples from files must be; None if nothing is known of them."""
    is_open = isinstance(config.model, PythonModelConfig) and config.model.classes is None
    if is_open and isinstance(config.data, PythonConfig):
        return None
    return example_rules(config.model, config.loss)


def _check_data(
    dataset: data.Dataset, first: dict, pipe: Pipeline, rules: data.Rules | None
) -> None:
    """Raise DataError for what the first step, or the first evaluation, would find later."""
    held_out = next(iter(dataset.test()), None)
    if held_out is None:
        raise DataError(f"the held-out data of {dataset.name} has no examples; give some")
    micro_batches.split(held_out, pipe.example, pipe.micro_batches)
    if rules:
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
