"""What the sections of a config describe: the data set, the network and its loss."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath

from gpipe_jax import data, losses, zoo
from gpipe_jax.config import (
    AmoebaNetConfig,
    ArraysConfig,
    FromFiles,
    MlpConfig,
    ModelConfig,
    SyntheticTokensConfig,
    TextConfig,
    TransformerConfig,
)
from gpipe_jax.config.data import image_shape
from gpipe_jax.config.run import Config
from gpipe_jax.data import stream
from gpipe_jax.distributed.mesh import make_mesh, simulate_devices
from gpipe_jax.errors import section
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import Genotype, is_json
from gpipe_jax.layers.layer import Layer
from gpipe_jax.pipeline import micro_batches
from gpipe_jax.pipeline.pipeline import Pipeline
from gpipe_jax.training import optimizers, writers
from gpipe_jax.training.trainer import Trainer
from gpipe_jax.utils.text import format_bytes
from gpipe_jax.utils.trees import tree_bytes

DATASETS: dict[str, Callable[..., data.Dataset]] = {
    "digits": data.digits,
    "text": data.text,
    "cifar10": data.cifar10,
    "arrays": data.arrays,
    "array_record": data.array_record,
    "python": data.python,
    "synthetic_images": data.synthetic_images,
    "synthetic_tokens": data.synthetic_tokens,
}


def dataset(config: Config) -> data.Dataset:
    """The data set of a config."""
    if not isinstance(config.data, FromFiles):
        _check_memory(config)
    options = config.data.model_dump(exclude={"kind"})
    if isinstance(config.data, TextConfig | SyntheticTokensConfig):
        options["length"] = config.model.length  # type: ignore[union-attr]  # a transformer's
    if isinstance(config.data, ArraysConfig):
        options["rules"] = rules(config.model)
    return DATASETS[config.data.kind](seed=config.train.seed, **options)


def rules(model: ModelConfig) -> data.Rules:
    """What a config's network reads."""
    if isinstance(model, TransformerConfig):
        return data.Rules(tokens=True, classes=model.vocabulary)
    return data.Rules(classes=model.features[-1] if isinstance(model, MlpConfig) else model.classes)


def _check_memory(config: Config) -> None:
    """Refuse a batch that this machine cannot hold: it would end the process, saying nothing."""
    need = tree_bytes(example(config))
    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise ValueError(
            f"`batch_size` {config.data.batch_size} takes {format_bytes(need)}, and this machine "
            f"has {format_bytes(have)} of memory; use a smaller batch"
        )


def example(config: Config) -> dict:
    """The shapes of a batch of a config's data, of which nothing is read if that can be."""
    if isinstance(config.data, FromFiles):
        like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype)  # noqa: E731
        return jax.tree.map(like, next(dataset(config).train(0)))
    count, images = config.data.batch_size, image_shape(config.data)
    if images is None:
        tokens = jax.ShapeDtypeStruct((count, config.model.length), np.int32)  # type: ignore[union-attr]
        return {"inputs": tokens, "labels": tokens}
    size, channels, _ = images
    inputs = jax.ShapeDtypeStruct((count, size, size, channels), np.float32)
    return {"inputs": inputs, "labels": jax.ShapeDtypeStruct((count,), np.int32)}


def network(model: ModelConfig) -> list[Layer]:
    """The layers of a config's model."""
    options = model.model_dump(exclude={"kind", "auxiliary_weight", "label_smoothing"})
    if isinstance(model, AmoebaNetConfig):
        options["genotype"] = _genotype(model.genotype)
        options["auxiliary"] = model.auxiliary_weight > 0
    return zoo.MODELS[model.kind](**options)


def loss(model: ModelConfig) -> Callable:
    """The loss function of a config's model."""
    if isinstance(model, TransformerConfig):
        return losses.softmax_cross_entropy
    return losses.classification(
        label_smoothing=getattr(model, "label_smoothing", 0.0),
        auxiliary_weight=getattr(model, "auxiliary_weight", 0.0),
    )


def _genotype(source: str) -> Genotype:
    if source in GENOTYPES:
        return GENOTYPES[source]
    if is_json(source):
        return Genotype.from_json(source)
    try:
        return Genotype.from_json(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"`genotype` {source} cannot be read ({reason}); give a file that Genotype.to_json "
            f"wrote, or one of {', '.join(GENOTYPES)}"
        ) from error


class Assembly(NamedTuple):
    """What a config describes."""

    config: Config
    workdir: epath.Path
    dataset: data.Dataset
    trainer: Trainer
    data: dict  # what the data set is, as `stream.identity` tells it

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of the run's checkpoints."""
        return self.workdir / "checkpoints"


def assemble(config: Config, workdir: epath.PathLike, processes: int = 1) -> Assembly:
    """Data, network, mesh, pipeline and optimizer of a config; trains nothing.

    Simulated devices are shared among so many processes. Raises `SectionError`: until the
    first step, what is wrong is the config.
    """
    if config.mesh.simulate:
        with section("mesh"):
            simulate_devices(_share(config.mesh.simulate, processes))
    with section("train"):
        writers.check(config.train.writers)
    with section("data"):
        batches = dataset(config)
        example = next(batches.train(0))
    with section("model"):
        layers, loss_function = network(config.model), loss(config.model)
    with section("mesh"):
        mesh = make_mesh(stages=config.mesh.stages, data=config.mesh.data)
    with section("pipeline"):
        options = config.pipeline.model_dump(exclude={"memory_limit_gib"})
        options["memory_limit"] = config.pipeline.memory_limit
        steps = config.train.steps
        pipe = Pipeline(
            layers, loss=loss_function, mesh=mesh, example=example, steps=steps, **options
        )
    if isinstance(config.data, FromFiles):
        with section("data"):
            _check_data(batches, example, pipe, rules(config.model))
    with section("optimizer"):
        tx = optimizers.build(config.optimizer, config.train.steps)
    with section("pipeline"):  # with this optimizer it may need more than the memory limit
        trainer = Trainer(pipe, tx, ema=config.optimizer.ema)
    return Assembly(
        config, epath.Path(workdir), batches, trainer, stream.identity(batches, example)
    )


def _check_data(dataset: data.Dataset, example: dict, pipe: Pipeline, rules: data.Rules) -> None:
    """Raise DataError now for what would be found at the first step, or the first evaluation."""
    held_out = next(iter(dataset.test()), None)
    if held_out is None:
        raise data.DataError(f"the held-out data of {dataset.name} has no examples; give some")
    micro_batches.split(held_out, pipe.example, pipe.micro_batches)
    rules.check(f"the first training batch of {dataset.name}", example)
    rules.check(f"the first held-out batch of {dataset.name}", held_out)


def _share(simulated: int, processes: int) -> int:
    if simulated % processes:
        raise ValueError(
            f"`simulate` {simulated} devices do not split over {processes} processes; use a "
            f"multiple of {processes}"
        )
    return simulated // processes
