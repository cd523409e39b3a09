"""What the sections of a config describe: the data set, the network and its loss."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from gpipe_jax import data, losses, zoo
from gpipe_jax.config import (
    AmoebaNetConfig,
    ArraysConfig,
    Config,
    FromFiles,
    MlpConfig,
    ModelConfig,
    SyntheticTokensConfig,
    TextConfig,
    TransformerConfig,
    image_shape,
)
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import Genotype, is_json
from gpipe_jax.layers.layer import Layer
from gpipe_jax.partition.costs import tree_bytes
from gpipe_jax.utils.units import GIB

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


class SectionError(ValueError):
    """What a section of the config asks for cannot be had."""

    def __init__(self, section: str, problem: str) -> None:
        named = problem.startswith(f"{section}.")
        super().__init__(problem if named else f"{section}: {problem}")
        self.section = section


@contextlib.contextmanager
def section(name: str) -> Iterator[None]:
    """Say of which section it is, if sizes, shapes, files or devices in here are wrong."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SectionError(name, str(error)) from error


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
            f"`batch_size` {config.data.batch_size} takes {need / GIB:.3g} GiB, and this machine "
            f"has {have / GIB:.3g} GiB of memory; use a smaller batch"
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
