"""Test the models alone: defaults, ranges, and the rules between sections."""

import subprocess
import sys
from typing import Any

import pydantic
import pytest

from gpipe_jax import data, zoo
from gpipe_jax.config.base import Mark, Section
from gpipe_jax.config.data import (
    Cifar10Config,
    DataConfig,
    DigitsConfig,
    SyntheticImagesConfig,
    SyntheticTokensConfig,
    TextConfig,
)
from gpipe_jax.config.models import (
    AmoebaNetConfig,
    ConvNetConfig,
    MlpConfig,
    ModelConfig,
    ResNetConfig,
    TransformerConfig,
)
from gpipe_jax.config.optimizers import AdamConfig, OptimizerConfig, RmsPropConfig, SgdConfig
from gpipe_jax.config.run import (
    Config,
    MeshConfig,
    PipelineConfig,
    layout,
    marks,
    section_models,
    unused,
)
from gpipe_jax.utils.text import batch_problem, nearest_multiples

DIGITS = {"model": {"kind": "mlp"}, "data": {"kind": "digits"}}
TEXT = {"model": {"kind": "transformer_lm"}, "data": {"kind": "text"}}


def make(base: dict[str, Any] = DIGITS, **sections: Any) -> Config:
    return Config.model_validate({**base, **sections})


def broken_rules(config: Config) -> list[tuple[str, str]]:
    return Config.cross_check(dict(config))


def test_model_and_data_are_enough():
    config = make()
    assert config.model == MlpConfig()
    assert config.optimizer == AdamConfig()
    assert broken_rules(config) == []


@pytest.mark.parametrize("missing", ["model", "data"])
def test_model_and_data_are_required(missing: str):
    with pytest.raises(pydantic.ValidationError, match=rf"{missing}\n  Field required"):
        Config.model_validate({name: value for name, value in DIGITS.items() if name != missing})


def test_models_are_frozen():
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        make().mesh.stages = 3  # type: ignore[misc]


def test_every_section_has_defaults_and_every_field_a_description():
    for section in Config.model_fields:
        for kind, model in section_models(section).items():
            own = {  # a file of one's own has no default
                name: "x:y" for name, field in model.model_fields.items() if field.is_required()
            }
            in_files = issubclass(model, DataConfig) and model.in_files
            assert not own or in_files or kind == "python"
            named = {"kind": kind, **own} if kind else {}
            assert model(**own) == model.model_validate(named) or kind == "adam"
            for name, field in model.model_fields.items():
                assert name == "kind" or field.description, f"{section}.{name}"


@pytest.mark.parametrize(
    ("section", "base", "registry"),
    [("model", ModelConfig, zoo.MODELS), ("data", DataConfig, data.DATASETS)],
)
def test_kinds_are_in_the_registry(section: str, base: type[Section], registry: dict[str, Any]):
    kinds = section_models(section)
    assert all(issubclass(model, base) for model in kinds.values())
    assert kinds.keys() - {"python"} <= registry.keys()
    if section == "data":
        assert kinds.keys() == registry.keys()


def test_every_optimizer_has_one_base():
    assert all(issubclass(model, OptimizerConfig) for model in section_models("optimizer").values())


def test_marks():
    """List what may change when a run resumes, and what a plan chooses."""
    names = {mark: [name for name, m in marks().items() if m is mark] for mark in Mark}
    assert names == {
        Mark.LAYOUT: [
            "mesh.stages",
            "mesh.data",
            "pipeline.micro_batches",
            "pipeline.schedule",
            "pipeline.chunks",
            "pipeline.partition",
            "pipeline.remat",
        ],
        Mark.OPERATION: [
            "mesh.simulate",
            "pipeline.cost",
            "pipeline.memory_limit_gib",
            "train.eval_every",
            "train.log_every",
            "train.save_every",
            "train.keep",
            "train.keep_best",
            "train.metrics",
            "train.callbacks",
            "train.writers",
            "train.workdir",
            "train.code",
            "profile.start",
            "profile.steps",
        ],
        Mark.LENGTH: ["train.steps", "train.seed", "train.init_from"],
    }
    config = make(mesh={"stages": 2})
    assert list(layout(config)) == names[Mark.LAYOUT]
    assert layout(config)["mesh.stages"] == 2


def test_adam_is_adamw():
    assert section_models("optimizer")["adam"] is section_models("optimizer")["adamw"]
    assert make(optimizer={"kind": "adam"}).optimizer == AdamConfig(kind="adam")


def test_jax_is_not_imported():
    code = "import sys, gpipe_jax.config.loader; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("model", "values"),
    [
        (ConvNetConfig, {"widths": [0], "depths": [1]}),
        (ConvNetConfig, {"widths": [], "depths": []}),
        (MlpConfig, {"features": [3]}),
        (TransformerConfig, {"dropout": 1.0}),
        (TransformerConfig, {"dtype": "float16"}),
        (TransformerConfig, {"positions": "none"}),
        (ResNetConfig, {"depths": []}),
        (ResNetConfig, {"width": 0}),
        (ResNetConfig, {"label_smoothing": 1.0}),
        (AmoebaNetConfig, {"genotype": ""}),
        (AmoebaNetConfig, {"stem": "none"}),
        (AmoebaNetConfig, {"filters": 0}),
        (AmoebaNetConfig, {"auxiliary_weight": -0.4}),
        (AmoebaNetConfig, {"drop_path": 1.0}),
        (AmoebaNetConfig, {"batch_norm_momentum": 1.0}),
        (AmoebaNetConfig, {"label_smoothing": -0.1}),
        (AmoebaNetConfig, {"sync_batch_norm": 2}),
        (DigitsConfig, {"test_fraction": 0.0}),
        (DigitsConfig, {"test_fraction": 1.0}),
        (DigitsConfig, {"shift": 8}),
        (TextConfig, {"source": ""}),
        (MeshConfig, {"stages": 0}),
        (MeshConfig, {"stages": True}),
        (MeshConfig, {"stages": 2**31}),
        (PipelineConfig, {"partition": [0]}),
        (PipelineConfig, {"chunks": 0}),
        (PipelineConfig, {"keys_per": "step"}),
        (PipelineConfig, {"cost": [-1.0]}),
        (PipelineConfig, {"memory_limit_gib": 0}),
        (SgdConfig, {"learning_rate": 0}),
        (SgdConfig, {"learning_rate": float("nan")}),
        (SgdConfig, {"learning_rate": True}),
        (SgdConfig, {"momentum": 1.0}),
        (SgdConfig, {"decay_rate": 1.1}),
        (SgdConfig, {"warmup_steps": -1}),
        (SgdConfig, {"clip_norm": 0}),
        (SgdConfig, {"l2": -1e-4}),
        (SgdConfig, {"ema": 1.0}),
        (RmsPropConfig, {"initial": -1.0}),
        (Cifar10Config, {"folder": ""}),
        (Cifar10Config, {"validation": 50_000}),
        (Cifar10Config, {"cutout": 33}),
        (SyntheticImagesConfig, {"image": 0}),
        (SyntheticTokensConfig, {"vocabulary": 0}),
    ],
)
def test_values_out_of_range_are_refused(model: type[pydantic.BaseModel], values: dict[str, Any]):
    with pytest.raises(pydantic.ValidationError) as caught:
        model.model_validate(values)
    assert {str(error["loc"][0]) for error in caught.value.errors()} == {next(iter(values))}


def test_depths_go_with_widths():
    match = r"needs one entry for each of model.widths: 3 depths \[2, 3, 2\], 2 widths \[8, 16\]"
    with pytest.raises(pydantic.ValidationError, match=match):
        ConvNetConfig(widths=(8, 16))


def test_heads_divide_width():
    match = "width 130 is not a multiple of heads 4; nearest legal widths: 128, 132"
    with pytest.raises(pydantic.ValidationError, match=match):
        TransformerConfig(width=130)


def test_layers_of_an_amoebanet_are_three_stacks():
    assert AmoebaNetConfig(layers=6).layers == 6
    with pytest.raises(pydantic.ValidationError, match=r"multiple of 3.*, got 7; .*: 6, 9"):
        AmoebaNetConfig(layers=7)


@pytest.mark.parametrize("genotype", ["A", "D", "found/best.json", "./C.json"])
def test_a_genotype_is_a_letter_or_a_file(genotype: str):
    assert AmoebaNetConfig(genotype=genotype).genotype == genotype


@pytest.mark.parametrize("genotype", ["E", "a", "best.yaml"])
def test_other_genotypes_are_refused(genotype: str):
    match = f"got '{genotype}', but the published ones are A, B, C, D; give .* path of a .json file"
    with pytest.raises(pydantic.ValidationError, match=match):
        AmoebaNetConfig(genotype=genotype)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "eager_1f1b"])
def test_several_chunks_are_interleaved(schedule: str):
    match = f"chunks 2 need pipeline.schedule 'interleaved', got '{schedule}'; use that schedule"
    with pytest.raises(pydantic.ValidationError, match=match):
        PipelineConfig.model_validate({"schedule": schedule, "chunks": 2})
    assert PipelineConfig(schedule="interleaved", chunks=2).chunks == 2


FALLS = ["optimizer.decay_rate", "optimizer.decay_steps", "optimizer.staircase"]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({}, {**dict.fromkeys(FALLS, "optimizer.schedule cosine"), "profile.start": "profile.st"}),
        ({"optimizer": {"kind": "sgd", "schedule": "exponential"}, "profile": {"steps": 2}}, {}),
        (
            {
                "data": {"kind": "array_record", "train": "a", "test": "b"},
                "optimizer": {"kind": "rmsprop", "schedule": "constant"},
                "profile": {"steps": 1},
            },
            {
                **dict.fromkeys(FALLS, "optimizer.schedule constant"),
                "data.test_fraction": "data.test b",
            },
        ),
        (
            {
                "data": {"kind": "arrays", "train": "a.npz"},
                "optimizer": {"kind": "sgd", "schedule": "exponential"},
            },
            {"profile.start": "profile.steps 0"},
        ),
    ],
)
def test_settings_that_do_nothing(sections: dict[str, Any], expected: dict[str, str]):
    found = unused(make(**sections))
    assert found.keys() == expected.keys()
    assert all(found[name].startswith(why) for name, why in expected.items())


@pytest.mark.parametrize("partition", [(3, 2), (2, 2), (1, 4, 4)])
def test_boundaries_increase(partition: tuple[int, ...]):
    with pytest.raises(pydantic.ValidationError, match=r"increasing, got [24] after [324]"):
        PipelineConfig(partition=partition)


@pytest.mark.parametrize(
    ("n", "m", "expected"),
    [(60, 16, (48, 64)), (5, 16, (16,)), (16, 16, (16, 32)), (17, 16, (16, 32)), (15, 1, (15, 16))],
)
def test_nearest_multiples(n: int, m: int, expected: tuple[int, ...]):
    assert nearest_multiples(n, m) == expected


def test_batch_problem():
    assert batch_problem(64, replicas=2, micro_batches=8) is None
    assert batch_problem(60, replicas=2, micro_batches=8) == (
        "batch_size 60 is not a multiple of data x micro_batches = 2 x 8 = 16; "
        "nearest legal values: 48, 64"
    )


CROSS_CHECKS = [
    (
        DIGITS,
        {"data": {"kind": "digits", "batch_size": 60}, "pipeline": {"micro_batches": 16}},
        "data.batch_size",
        r"60 is not a multiple of data x micro_batches = 1 x 16 = 16; nearest.*: 48, 64",
    ),
    (
        DIGITS,
        {"mesh": {"stages": 3}, "pipeline": {"partition": [1]}},
        "pipeline.partition",
        r"mesh.stages 3 needs 2 boundaries, got 1: \[1\]; give 2, or 'auto'",
    ),
    (
        DIGITS,
        {
            "mesh": {"stages": 2},
            "pipeline": {"partition": [1, 2], "chunks": 2, "schedule": "interleaved"},
        },
        "pipeline.partition",
        r"mesh.stages 2 x pipeline.chunks 2 needs 3 boundaries, got 2: \[1, 2\]; give 3, or",
    ),
    (
        DIGITS,
        {"mesh": {"stages": 2, "data": 2, "simulate": 3}},
        "mesh.simulate",
        "simulate 3 is less than stages x data = 2 x 2 = 4; raise it to 4",
    ),
    (DIGITS, {"data": {"kind": "text"}}, "model.kind", "model 'mlp' cannot read data 'text'"),
    (TEXT, {"data": {"kind": "digits"}}, "model.kind", "'transformer_lm' cannot .* 'digits'; data"),
    (
        DIGITS,
        {"model": {"kind": "mlp", "features": [32, 10]}},
        "model.features",
        r"first of features 32 does not fit data 'digits' \(8 x 8 .*\); make it 64",
    ),
    (
        DIGITS,
        {"model": {"kind": "mlp", "features": [64, 11]}},
        "model.features",
        r"last of features 11 does not fit data 'digits' \(10 classes\); make it 10",
    ),
    (
        DIGITS,
        {"model": {"kind": "convnet", "in_channels": 3}},
        "model.in_channels",
        "in_channels 3 .*; make it 1",
    ),
    (
        DIGITS,
        {"model": {"kind": "convnet", "classes": 3}},
        "model.classes",
        "classes 3 .*; make it 10",
    ),
    (
        DIGITS,
        {"model": {"kind": "convnet"}, "data": {"kind": "cifar10"}},
        "model.in_channels",
        r"in_channels 1 does not fit data 'cifar10' \(32 x 32 x 3 images\); make it 3",
    ),
    (
        DIGITS,
        {"model": {"kind": "mlp", "features": [64, 10]}, "data": {"kind": "cifar10"}},
        "model.features",
        r"first of features 64 does not fit data 'cifar10' \(32 x 32 x 3 .*\); make it 3072",
    ),
    (
        DIGITS,
        {
            "model": {"kind": "convnet", "in_channels": 3},
            "data": {"kind": "synthetic_images", "classes": 7},
        },
        "model.classes",
        r"classes 10 does not fit data 'synthetic_images' \(7 classes\); make it 7",
    ),
    (
        DIGITS,
        {
            "model": {"kind": "amoebanet", "classes": 10, "image": 28},
            "data": {"kind": "cifar10"},
        },
        "model.image",
        r"image 28 does not fit data 'cifar10' \(32 x 32 x 3 images\); make it 32",
    ),
    (
        DIGITS,
        {"model": {"kind": "resnet"}, "data": {"kind": "cifar10"}},
        "model.classes",
        r"classes 1000 does not fit data 'cifar10' \(10 classes\); make it 10",
    ),
    (
        TEXT,
        {"data": {"kind": "synthetic_images"}},
        "model.kind",
        "'transformer_lm' cannot read data 'synthetic_images'; .* text and synthetic_tokens go",
    ),
    (DIGITS, {"data": {"kind": "synthetic_tokens"}}, "model.kind", "'mlp' cannot read data 'synth"),
    (
        TEXT,
        {"data": {"kind": "synthetic_tokens", "vocabulary": 257}},
        "data.vocabulary",
        "vocabulary 257 is more than model.vocabulary 256; use 256 or less",
    ),
]


@pytest.mark.parametrize(("base", "sections", "name", "match"), CROSS_CHECKS)
def test_cross_checks(base: dict[str, Any], sections: dict[str, Any], name: str, match: str):
    with pytest.raises(pydantic.ValidationError, match=match) as caught:
        make(base, **sections)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [name]


@pytest.mark.parametrize(
    "sections",
    [
        {"mesh": {"stages": 3, "data": 2, "simulate": 6}, "pipeline": {"partition": [1, 2]}},
        {"pipeline": {"partition": []}},
        {
            "mesh": {"stages": 2},
            "pipeline": {"partition": [1, 2, 3], "chunks": 2, "schedule": "interleaved"},
        },
        {"model": {"kind": "convnet"}},
    ],
)
def test_what_agrees_is_accepted(sections: dict[str, Any]):
    assert broken_rules(make(DIGITS, **sections)) == []


@pytest.mark.parametrize(
    ("model", "data"),
    [
        ({"kind": "transformer_lm"}, {"kind": "text"}),
        ({"kind": "transformer_lm"}, {"kind": "synthetic_tokens", "vocabulary": 7}),
        ({"kind": "convnet", "in_channels": 3}, {"kind": "cifar10"}),
        ({"kind": "resnet", "classes": 10}, {"kind": "cifar10"}),
        ({"kind": "amoebanet", "classes": 10, "image": 32}, {"kind": "cifar10"}),
        ({"kind": "amoebanet"}, {"kind": "synthetic_images"}),
        ({"kind": "mlp", "features": [3072, 10]}, {"kind": "cifar10"}),
        (
            {"kind": "mlp", "features": [75, 2]},
            {"kind": "synthetic_images", "image": 5, "classes": 2},
        ),
    ],
)
def test_models_take_the_data_they_fit(model: dict[str, Any], data: dict[str, Any]):
    assert broken_rules(make(model=model, data=data)) == []


def test_all_cross_checks_are_reported_at_once():
    with pytest.raises(pydantic.ValidationError) as caught:
        make(
            model={"kind": "convnet", "classes": 3, "in_channels": 3},
            data={"kind": "digits", "batch_size": 7},
            mesh={"stages": 2, "data": 2, "simulate": 1},
            pipeline={"partition": [1, 2]},
        )
    names = [".".join(map(str, error["loc"])) for error in caught.value.errors()]
    assert names == [
        "data.batch_size",
        "pipeline.partition",
        "mesh.simulate",
        "model.in_channels",
        "model.classes",
    ]
