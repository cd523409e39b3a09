"""Provide the models, options and files of the scripts that reproduce the GPipe paper's tables."""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from gpipe_jax import losses, zoo
from gpipe_jax.config.optimizers import RmsPropConfig
from gpipe_jax.planner.job import Job
from gpipe_jax.planner.plan import COMPILED
from gpipe_jax.planner.predict import Compiler
from gpipe_jax.tpu_compiler import libtpu
from gpipe_jax.tpu_compiler.topologies import Topology
from gpipe_jax.training import optimizers

LENGTH = 1024  # tokens in a sequence
IMAGE, CLASSES = 224, 1000


def transformer(layers: int, batch: int, *, halves: bool = False) -> Job:
    """Return Transformer-L of the paper's table 1, section 3, on a batch of sequences."""
    network = zoo.transformer_lm(
        vocabulary=32000,
        length=LENGTH,
        width=2048,
        heads=32,
        feed_forward=8192,
        layers=layers,
        positions="sinusoidal",
        halves=halves,
        dtype="bfloat16",
    )
    tokens = jax.ShapeDtypeStruct((batch, LENGTH), np.int32)
    return _job(network, losses.softmax_cross_entropy, tokens, tokens)


def amoebanet(layers: int, filters: int, batch: int) -> Job:
    """Return AmoebaNet-D (layers, filters) of the paper's table 1, on a batch of images."""
    network = zoo.amoebanet(
        "D", layers=layers, filters=filters, image=IMAGE, classes=CLASSES, dtype="bfloat16"
    )
    images = jax.ShapeDtypeStruct((batch, IMAGE, IMAGE, 3), np.float32)
    labels = jax.ShapeDtypeStruct((batch,), np.int32)
    return _job(network, losses.classification(), images, labels)


def _job(network: list, loss: Callable, inputs: jax.ShapeDtypeStruct, labels: object) -> Job:
    """Return a job with RMSProp: its two slots make 12 bytes a parameter, as in the paper."""
    tx = optimizers.build(RmsPropConfig(learning_rate=1e-4, momentum=0.9), 100)
    return Job(network, loss, {"inputs": inputs, "labels": labels}, tx)


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options of both scripts."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds for one compilation")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the figures there")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    return parser


def make_compiler(topology: Topology, timeout_s: float | None) -> Compiler:
    """Return a compiler that prints its progress; raise RuntimeError if libtpu is missing."""
    libtpu.check_installed()

    def show(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    return Compiler(topology, timeout_s, show)


def finish(options: argparse.Namespace, records: Sequence[dict], draw: Callable) -> None:
    """Write the files that the options request; `draw` takes the picture's path."""
    print(COMPILED)
    if options.csv:
        write_csv(options.csv, records)
    if options.png:
        draw(options.png)
    if options.json:
        print(json.dumps({"rows": records, "versions": libtpu.versions(), "note": COMPILED}))


def write_csv(path: Path, records: Sequence[dict]) -> None:
    """Write a line for each record, and columns in the order of their first occurrence."""
    names = list(dict.fromkeys(name for record in records for name in record))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(records)
