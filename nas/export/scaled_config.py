"""The winner scaled up: a config by which `gpipe train` trains it through the pipeline.

More cells and filters, as in section "Experiment setup" of Real et al. 2019
(https://arxiv.org/abs/1802.01548), with the data of the search. JAX is loaded when it is used.
"""

import math
import shlex
import textwrap
from dataclasses import replace
from typing import Any, NamedTuple

import yaml

from gpipe_jax.genotypes.genotype import Genotype
from nas.training.evaluator import TrainingEvaluator

CELLS, FILTERS, STAGES = 18, 32, 4  # the paper's N = 6 and F = 32
EPOCHS = 600
AUXILIARY = 32  # pixels each way from which on there is a second classifier


class Target(NamedTuple):
    """What the network is to be trained on, and by which recipe: parts of a config."""

    model: dict[str, Any]
    data: dict[str, Any]
    micro_batches: int
    optimizer: dict[str, Any]
    train: dict[str, int]
    simulate: bool  # on CPU devices: a toy
    note: str


def target(evaluate: Any) -> Target:
    """Of a search with this evaluator: its own data, or else CIFAR-10 as in the paper."""
    if not isinstance(evaluate, TrainingEvaluator):
        note = "The search's data are not known: these are CIFAR-10, as in the paper; change them."
        return _paper({"kind": "cifar10", "folder": None}, (32, 3, 10), 50_000, note)
    if evaluate.data == "digits":
        return DIGITS
    split = replace(evaluate, examples=None).data_fits()  # all of them, not the search's share
    _, size, _, channels = split.images.shape
    count = len(split.labels) + len(split.held_labels)
    sizes = (size, channels, split.classes)
    if evaluate.data == "cifar10":
        return _paper({"kind": "cifar10", "folder": evaluate.folder}, sizes, count, "")
    data = {"kind": "arrays", "train": evaluate.data}
    return _paper(data, sizes, count, "A tenth of the file is kept for evaluation.")


DIGITS = Target(
    model={
        **{"image": 8, "in_channels": 1, "classes": 10},
        **{"label_smoothing": 0.1, "batch_norm_momentum": 0.9},
    },
    data={"kind": "digits", "batch_size": 128},
    micro_batches=4,
    optimizer={
        **{"kind": "adamw", "learning_rate": 0.01, "warmup_steps": 50},
        **{"weight_decay": 0.05, "ema": 0.99},
    },
    train={"steps": 1000, "eval_every": 500},
    simulate=True,
    note="The recipe is that of configs/amoebanet_digits.yaml.",
)


def _paper(data: dict[str, Any], sizes: tuple[int, int, int], examples: int, note: str) -> Target:
    image, channels, classes = sizes
    model: dict[str, Any] = {"image": image, "in_channels": channels, "classes": classes}
    if image >= AUXILIARY:
        model["auxiliary_weight"] = 0.5
    micro_batches = 8
    batch = min(128, examples) // micro_batches * micro_batches
    if not batch:
        raise ValueError(
            f"{examples} training examples do not make {micro_batches} micro-batches; give more"
        )
    epoch = math.ceil(examples / batch)
    recipe = f"The recipe is the paper's for CIFAR-10: {EPOCHS} epochs, in train.steps."
    return Target(
        model={**model, "drop_path": 0.3, "batch_norm_momentum": 0.9},
        data={**{k: v for k, v in data.items() if v is not None}, "batch_size": batch},
        micro_batches=micro_batches,
        optimizer={
            **{"kind": "sgd", "learning_rate": 0.024, "momentum": 0.9},
            **{"schedule": "cosine", "l2": 0.0005},
        },
        train={"steps": EPOCHS * epoch, "eval_every": 10 * epoch, "log_every": 100},
        simulate=False,
        note=" ".join(filter(None, [note, recipe])),
    )


def sections(
    genotype: Genotype, of: Target, *, cells: int, filters: int, stages: int
) -> dict[str, dict[str, Any]]:
    """The config; ConfigError, or ValueError, if there is no such network or cut."""
    from gpipe_jax.config import loader
    from gpipe_jax.training import from_config

    model = {
        **{"kind": "amoebanet", "genotype": genotype.to_json(), "layers": cells},
        **{"filters": filters, "stem": "cifar"},
        **of.model,
    }
    found = {
        "model": model,
        "data": of.data,
        "mesh": {"stages": stages, **({"simulate": stages} if of.simulate else {})},
        "pipeline": {
            **{"micro_batches": of.micro_batches, "schedule": "eager_1f1b"},
            "partition": "auto",
        },
        "optimizer": of.optimizer,
        "train": of.train,
    }
    layers = len(from_config.network(loader.load(found).model))
    if layers < stages:
        raise ValueError(
            f"stages {stages} is more than the {layers} layers of a network of {cells} cells, and "
            f"no stage can be empty; give {layers} or less, or more cells"
        )
    return found


def text(config: dict[str, dict[str, Any]], title: str, note: str, out: str) -> str:
    """The config's file: what it is, how to use it, and the sections."""
    lines, name = textwrap.wrap(f"{title} {note}", 97), shlex.quote(out)
    lines += ["", f"  gpipe train {name}", f"  gpipe plan {name} --topology v5e:2x2", ""]
    head = "\n".join(f"# {line}".rstrip() for line in "\n".join(lines).splitlines())
    return "\n".join([f"{head}\n#", *(_section(*each) for each in config.items())])


def _section(name: str, fields: dict[str, Any]) -> str:
    lines = textwrap.indent("\n".join(_field(*each) for each in fields.items()), "  ")
    return f"{name}:\n{lines}" + ("\n" if name == "train" else "")


def _field(key: str, value: Any) -> str:
    if key == "genotype":
        return f"{key}: >-\n" + textwrap.indent("\n".join(textwrap.wrap(value, 94)), "  ")
    # A path, say, may have to be in quotes.
    written = yaml.safe_dump({key: value}, width=math.inf, allow_unicode=True).rstrip("\n")
    if key == "simulate":
        return f"{written}  # CPU devices; delete this line on a machine with {value} accelerators"
    if key == "partition":
        return f"{written}  # where the cost of the stages is most even"
    return written
