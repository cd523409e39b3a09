"""Scale the winner of a search up: write a config that trains it with `gpipe train`.

The network has more cells and filters, as in section "Experiment setup" of Real et al. 2019
(https://arxiv.org/abs/1802.01548), and trains on the data of the search. JAX is imported on use.
"""

import math
import shlex
import textwrap
from dataclasses import replace
from typing import Any, NamedTuple

import yaml

from gpipe_jax.genotypes.genotype import Genotype
from nas.errors import ExportOptionError
from nas.training.evaluator import TrainingEvaluator

CELLS_PER_STACK, FILTERS, STAGES = 6, 32, 4  # the paper's N and F; devices of the pipeline
EPOCHS = 600  # of the paper's training
AUXILIARY_SIZE = 32  # pixels each way; larger and equal images get an auxiliary classifier


class Target(NamedTuple):
    """Hold the data and the recipe that the network is trained with, as sections of a config."""

    model: dict[str, Any]
    data: dict[str, Any]
    micro_batches: int
    optimizer: dict[str, Any]
    train: dict[str, int]
    simulate: bool  # run on simulated CPU devices: the network is a toy
    note: str


def target(evaluator: Any) -> Target:
    """Choose data and recipe for a search with this evaluator.

    The data are those of the search; for an evaluator that does not train, CIFAR-10 as in the
    paper.
    """
    if not isinstance(evaluator, TrainingEvaluator):
        note = "The search's data are not known: these are CIFAR-10, as in the paper; change them."
        return _paper({"kind": "cifar10"}, (32, 3, 10), 50_000, note)
    if evaluator.data == "digits":
        return DIGITS
    split = replace(evaluator, examples=None).load_data()  # all examples, not the search's share
    _, image, _, channels = split.images.shape
    count = len(split.labels) + len(split.held_labels)
    sizes = (image, channels, split.classes)
    if evaluator.data == "cifar10":
        data = {"kind": "cifar10"}
        if evaluator.folder is not None:
            data["folder"] = evaluator.folder
        return _paper(data, sizes, count, "")
    data = {"kind": "arrays", "train": evaluator.data}
    return _paper(data, sizes, count, "A tenth of the file is kept for evaluation.")


DIGITS = Target(
    model=dict(image=8, in_channels=1, classes=10, label_smoothing=0.1, batch_norm_momentum=0.9),
    data=dict(kind="digits", batch_size=128),
    micro_batches=4,
    optimizer=dict(kind="adamw", learning_rate=0.01, warmup_steps=50, weight_decay=0.05, ema=0.99),
    train=dict(steps=1000, eval_every=500),
    simulate=True,
    note="The recipe is that of configs/amoebanet_digits.yaml.",
)


def _paper(data: dict[str, Any], sizes: tuple[int, int, int], examples: int, note: str) -> Target:
    """Return the paper's recipe for CIFAR-10, for images of these (pixels, channels, classes)."""
    image, channels, classes = sizes
    model: dict[str, Any] = dict(image=image, in_channels=channels, classes=classes)
    if image >= AUXILIARY_SIZE:
        model["auxiliary_weight"] = 0.5
    model |= dict(drop_path=0.3, batch_norm_momentum=0.9)
    micro_batches = 8
    batch_size = min(128, examples) // micro_batches * micro_batches
    if batch_size == 0:
        raise ValueError(
            f"{examples} training examples do not make {micro_batches} micro-batches; provide at "
            f"least {micro_batches}"
        )
    epoch = math.ceil(examples / batch_size)  # steps
    recipe = f"The recipe is the paper's for CIFAR-10: {EPOCHS} epochs, in train.steps."
    return Target(
        model=model,
        data={**data, "batch_size": batch_size},
        micro_batches=micro_batches,
        optimizer=dict(kind="sgd", learning_rate=0.024, momentum=0.9, schedule="cosine", l2=0.0005),
        train=dict(steps=EPOCHS * epoch, eval_every=10 * epoch, log_every=100),
        simulate=False,
        note=f"{note} {recipe}".strip(),
    )


def sections(
    genotype: Genotype, target: Target, *, cells_per_stack: int, filters: int, stages: int
) -> dict[str, dict[str, Any]]:
    """Return the config of the scaled network, by section.

    Args:
        genotype: The cells.
        target: Data and recipe.
        cells_per_stack: Normal cells in each of the three stacks (N); `model.layers` is 3 N.
        filters: Filters of the first stack (F).
        stages: Pipeline stages, one device each.

    Raises:
        ExportOptionError: There are more stages than layers.
        ConfigError, SectionError: There is no such network.
    """
    from gpipe_jax.config import loader
    from gpipe_jax.training import from_config

    mesh = dict(stages=stages)
    if target.simulate:
        mesh["simulate"] = stages
    config = {
        "model": dict(
            kind="amoebanet",
            genotype=genotype.to_json(),
            layers=3 * cells_per_stack,
            filters=filters,
            stem="cifar",
            **target.model,
        ),
        "data": target.data,
        "mesh": mesh,
        "pipeline": dict(
            micro_batches=target.micro_batches, schedule="eager_1f1b", partition="auto"
        ),
        "optimizer": target.optimizer,
        "train": target.train,
    }
    layers = len(from_config.network(loader.load(config).model))
    if layers < stages:
        raise ExportOptionError(
            "stages",
            stages,
            f"a network with cells_per_stack {cells_per_stack} has {layers} layers, and no stage "
            f"can be empty; use at most {layers}, or more cells",
        )
    return config


def text(config: dict[str, dict[str, Any]], title: str, note: str, out: str) -> str:
    """Return the text of the config's file: a header of comments, then the sections."""
    name = shlex.quote(out)
    header = [
        *textwrap.wrap(f"{title} {note}", 97),
        "",
        f"  gpipe train {name}",
        f"  gpipe plan {name} --topology v5e:2x2",
        "",
    ]
    # A file name may hold line breaks.
    comment = "\n".join(f"# {line}".rstrip() for line in "\n".join(header).splitlines())
    return "\n".join([f"{comment}\n#", *(_section(*each) for each in config.items())])


def _section(name: str, fields: dict[str, Any]) -> str:
    lines = textwrap.indent("\n".join(_field(*each) for each in fields.items()), "  ")
    end = "\n" if name == "train" else ""  # the last section
    return f"{name}:\n{lines}{end}"


def _field(key: str, value: Any) -> str:
    if key == "genotype":
        return f"{key}: >-\n" + textwrap.indent("\n".join(textwrap.wrap(value, 94)), "  ")
    # `safe_dump` quotes a text where YAML needs quotes, as in some paths.
    written = yaml.safe_dump({key: value}, width=math.inf, allow_unicode=True).rstrip("\n")
    if key == "simulate":
        return f"{written}  # CPU devices; delete this line on a machine with {value} accelerators"
    if key == "partition":
        return f"{written}  # balances the cost of the stages"
    return written
