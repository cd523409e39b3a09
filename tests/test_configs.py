"""Check every file in configs/ against its own comments, and how sections become a run."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from paths import CONFIGS as FOLDER

from gpipe_jax import data, losses, zoo
from gpipe_jax.cli import main as cli
from gpipe_jax.config.loader import load
from gpipe_jax.config.models import AmoebaNetConfig, TransformerConfig
from gpipe_jax.config.run import Config, section_models
from gpipe_jax.layers.shape_inference import LayerShape, infer_shapes
from gpipe_jax.training import from_config, optimizers, run

FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if "\nmodel:" in path.read_text())


def head(name: str) -> list[str]:
    """Return the lines of the comment that a file opens with."""
    text = (FOLDER / name).read_text(encoding="utf-8").split("\nmodel:")[0]
    assert all(line.startswith("#") for line in text.splitlines())
    return [line.removeprefix("#").strip() for line in text.splitlines()]


# --- the files ------------------------------------------------------------------------------------


def micro_batch(config: Config) -> dict:
    """Return the shapes of one micro-batch."""
    size = config.data.batch_size // (config.pipeline.micro_batches * config.mesh.data)
    images = config.data.images()
    if images is None:
        assert isinstance(config.model, TransformerConfig)
        tokens = jax.ShapeDtypeStruct((size, config.model.length), jnp.int32)
        return {"inputs": tokens, "labels": tokens}
    pixels, channels, _ = images
    return {
        "inputs": jax.ShapeDtypeStruct((size, pixels, pixels, channels), jnp.float32),
        "labels": jax.ShapeDtypeStruct((size,), jnp.int32),
    }


def infer(config: Config) -> list[LayerShape]:
    model = config.model
    if isinstance(model, AmoebaNetConfig):
        # It changes no shape, but makes layers unequal, and each unequal one takes its time.
        model = model.model_copy(update={"drop_path": 0.0})
    return infer_shapes(from_config.network(model), micro_batch(config)["inputs"])


def count(shapes: list[LayerShape]) -> int:
    return sum(a.size for shape in shapes for a in jax.tree.leaves(shape.params))


def claimed(what: str, name: str) -> int | None:
    found = re.search(rf"([\d,]+) {what}", " ".join(head(name)))
    return int(found[1].replace(",", "")) if found else None


def test_there_are_files() -> None:
    assert "digits.yaml" in FILES and "transformer_128_stages.yaml" in FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_opens_with_its_command_and_says_what_was_checked(name: str) -> None:
    config, text = load(FOLDER / name), " ".join(head(name))
    assert ("not run" in text) == (config.mesh.simulate is None)
    assert "https://" in text or config.mesh.simulate, "no source"
    command = head(name)[2].split()
    assert command[:3] == ["gpipe", "train", f"configs/{name}"]
    asked = load(FOLDER / name, command[3:])
    optimizers.build(asked.optimizer, asked.train.steps)  # the warm-up fits into the steps


@pytest.mark.parametrize("name", FILES)
def test_parameters_and_shapes(name: str) -> None:
    config = load(FOLDER / name)
    shapes, one = infer(config), micro_batch(config)
    assert count(shapes) == claimed("parameters", name)
    auxiliary = sum(count([s]) for s in shapes if "AuxiliaryHead" in str(s.layer))
    assert claimed("without the auxiliary head", name) == (
        count(shapes) - auxiliary if auxiliary else None
    )
    values, metrics = jax.eval_shape(
        from_config.loss(config.model), shapes[-1].output, one["labels"]
    )
    assert values.shape == metrics["accuracy"].shape == one["labels"].shape
    assert len(shapes) >= config.mesh.stages * config.pipeline.chunks


@pytest.mark.parametrize("name", FILES)
def test_the_bubble_of_large_pipelines_is_small(name: str) -> None:
    """M >= 4K makes it negligible (GPipe, 2.3); simulated pipelines are there to be looked at."""
    config = load(FOLDER / name)
    if config.mesh.simulate is None:
        assert config.pipeline.micro_batches >= 4 * config.mesh.stages


# --- from sections to a run -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted({*section_models("model")} - {"python"}))
def test_a_model_has_the_arguments_of_its_network_with_the_same_defaults(kind: str) -> None:
    model = section_models("model")[kind]()
    parameters = inspect.signature(zoo.MODELS[kind]).parameters
    known = {name: p.default for name, p in parameters.items() if name != "auxiliary"}
    of_others = {"kind", "auxiliary_weight", "label_smoothing", "trainable", "frozen"}
    assert {k: v for k, v in dict(model).items() if k not in of_others} == known
    assert from_config.network(model) == zoo.MODELS[kind]()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", section_models("data"))
def test_a_data_set_has_the_arguments_of_its_function(kind: str) -> None:
    known = set(inspect.signature(data.DATASETS[kind]).parameters)
    fields = set(section_models("data")[kind].model_fields) - {"kind"}
    given = {"seed", "length", "augment", "rules", "decode", "folder"}
    assert known - fields <= given and not fields - known


@pytest.mark.parametrize("genotype", ["B", "C.json"])
def test_genotypes(genotype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("C.json").write_text(zoo.AMOEBANET_C.to_json())
    options: dict[str, Any] = {"layers": 3, "filters": 8}
    found = from_config.network(AmoebaNetConfig(genotype=genotype, auxiliary_weight=0.4, **options))
    cells = zoo.AMOEBANET_B if genotype == "B" else zoo.AMOEBANET_C
    assert found == zoo.amoebanet(cells, auxiliary=True, **options)
    assert found != zoo.amoebanet("D", auxiliary=True, **options)


def test_losses() -> None:
    assert from_config.loss(TransformerConfig()) is losses.softmax_cross_entropy
    model = AmoebaNetConfig(label_smoothing=0.1, auxiliary_weight=0.5)
    assert from_config.loss(model) == losses.classification(
        label_smoothing=0.1, auxiliary_weight=0.5
    )
    convnet = section_models("model")["convnet"]()
    assert from_config.loss(convnet) == losses.classification()  # type: ignore[arg-type]


def test_tokens_have_the_length_of_the_model() -> None:
    config = load({"model": {"kind": "transformer_lm", "length": 6}, "data": TOKENS})
    batch = next(from_config.dataset(config).train(0))
    assert batch["inputs"].shape == batch["labels"].shape == (4, 6)
    assert batch["inputs"].max() < 3


TOKENS = {"kind": "synthetic_tokens", "vocabulary": 3, "batch_size": 4}
CHUNKS = {
    "model": {"kind": "mlp", "features": [64, 12, 12, 12, 10]},
    "data": {"kind": "digits", "batch_size": 24},
    "mesh": {"stages": 2},
    "pipeline": {
        "micro_batches": 2,
        "schedule": "interleaved",
        "chunks": 2,
        "keys_per": "example",
    },
    "train": {"steps": 2, "eval_every": 2},
}


def test_a_run_of_chunks(tmp_path: Path) -> None:
    parts = from_config.assemble(load(CHUNKS), tmp_path)
    pipe = parts.trainer.pipe
    assert (pipe.schedule.kind, pipe.schedule.chunks) == ("interleaved", 2)
    assert (pipe.keys_per, pipe.steps) == ("example", 2)
    figures = run.train(parts, lambda record: None).figures
    assert (figures["stages"], figures["steps"]) == (4, 2)
    assert figures["parameters"] == 65 * 12 + 13 * 12 + 13 * 12 + 13 * 10
    assert "test_accuracy" in figures and "bits_per_byte" not in figures


# --- what is found later than the config's own checks ---------------------------------------------

AMOEBANET = """\
model:
  kind: amoebanet
  image: 8
  classes: 10
  in_channels: 1
  stem: cifar
  filters: 8
  layers: 3
data: {kind: digits}
"""
LATE = [
    (["model.auxiliary_weight=0.4"], r"x.yaml:3: model: `image` is 8, but the auxiliary head"),
    (["model.filters=1"], r"override 'model.filters=1': model: `filters` is 1, but the narrowest"),
    (
        ["model.genotype=a.json"],
        r"override 'model.genotype=a.json': model: `genotype` a.json cannot be read \(No such file",
    ),
    (["model.genotype=bad.json"], r"`genotype` bad.json cannot be read \(genotype: not JSON"),
    (["mesh.stages=99"], r"override 'mesh.stages=99': mesh: a mesh of 99 stages"),
    (["data={kind: digits, batch_size: 1500}"], r"override 'data=.*': data: `batch_size` 1500 is"),
    (["mesh.data=99", "data.batch_size=99"], r"override 'mesh.data=99': mesh: a mesh of 1 stages"),
    (
        ["pipeline.memory_limit_gib=1e-6"],
        r"override 'pipeline.memory_limit_gib=1e-6': pipeline: layer 1 .* above memory_limit",
    ),
    (
        ["optimizer.kind=sgd", "optimizer.warmup_steps=2000"],
        r"override 'optimizer.warmup_steps=2000': optimizer: `warmup_steps` 2000 leaves nothing",
    ),
    (
        ["train.writers=[wandb]"],
        r"override 'train.writers=\[wandb\]': train: `writers`: wandb needs wandb",
    ),
    (
        ["model={kind: transformer_lm}", "data={kind: text}", "data.source=missing.txt"],
        r"override 'data.source=missing.txt': data: .* text file missing.txt",
    ),
    (
        ["data={kind: arrays, train: a.npz}", "data.test=b.npz"],
        r"override 'data=.*': data: `train` a.npz cannot be read",
    ),
    (["data={kind: python}", "data.source=no.py:f"], r"override 'data.source=no.py:f': data: `so"),
]


@pytest.mark.parametrize(("overrides", "pattern"), LATE, ids=[o[-1] for o, _ in LATE])
def test_late_errors_have_a_place(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    pattern: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(AMOEBANET)
    Path("bad.json").write_text("{")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert cli.main(["train", "x.yaml", *overrides]) == 2
    first, second, *rest = capsys.readouterr().err.splitlines()
    assert (first, rest) == ("gpipe: 1 problem in x.yaml:", [])
    assert re.search(pattern, second), second
