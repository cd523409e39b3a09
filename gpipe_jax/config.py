"""What a run can be told: frozen models, one default for each setting, and the checks across them.

This file is the only place where a default is written. It knows nothing of files (see `loader`) and
does not import jax, so a command can refuse a bad configuration before it touches a device.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic import ValidationError as PydanticError
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

LARGEST = 2**31 - 1  # jax holds shapes and steps in 32 bits


def _whole(value: Any) -> Any:
    # Python counts True as 1, and YAML reads an unquoted `yes` as True: never what was meant.
    if isinstance(value, bool):
        raise PydanticKnownError("int_type")
    return value


def _real(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


Count = Annotated[int, Field(ge=1, le=LARGEST), BeforeValidator(_whole)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST), BeforeValidator(_whole)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_real)]
PositiveOrZero = Annotated[float, Field(ge=0), BeforeValidator(_real)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_real)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every model here: immutable, no unknown keys, only finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )


class ConvNetConfig(Section):
    """A residual network for small images."""

    kind: Literal["convnet"] = "convnet"
    widths: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        default=(16, 32, 64), description="channels of each group of residual blocks"
    )
    depths: tuple[Count, ...] = Field(
        default=(2, 3, 2), description="residual blocks in each group; as many entries as widths"
    )
    classes: Count = Field(default=10, description="number of classes")
    in_channels: Count = Field(default=1, description="channels of the input images")

    @field_validator("depths")
    @classmethod
    def _one_depth_a_width(cls, depths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        widths = info.data.get("widths", depths)
        if len(widths) != len(depths):
            raise ValueError(
                f"needs one entry for each of model.widths: {len(depths)} depths {list(depths)}, "
                f"{len(widths)} widths {list(widths)}; give as many depths as widths"
            )
        return depths


class TransformerConfig(Section):
    """A decoder-only language model."""

    kind: Literal["transformer_lm"] = "transformer_lm"
    vocabulary: Count = Field(default=256, description="number of tokens; 256 for bytes")
    length: Count = Field(default=128, description="tokens in a training sequence")
    width: Count = Field(default=128, description="features of a token; a multiple of heads")
    heads: Count = Field(default=4, description="attention heads; divides width")
    feed_forward: Count = Field(
        default=512, description="hidden features of the feed-forward block"
    )
    layers: Count = Field(default=4, description="number of transformer blocks")
    dropout: Fraction = Field(
        default=0.0, description="probability of dropping an activation, in [0, 1)"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the activations; parameters stay in float32"
    )

    @field_validator("heads")
    @classmethod
    def _heads_divide_width(cls, heads: int, info: ValidationInfo) -> int:
        width = info.data.get("width", heads)
        if width % heads:
            legal = ", ".join(map(str, nearest_multiples(width, heads)))
            raise ValueError(
                f"must divide model.width: width {width} is not a multiple of heads {heads}; "
                f"nearest legal widths: {legal}"
            )
        return heads


class MlpConfig(Section):
    """Dense layers with a nonlinearity between them."""

    kind: Literal["mlp"] = "mlp"
    features: Annotated[tuple[Count, ...], Field(min_length=2)] = Field(
        default=(64, 128, 128, 10), description="layer widths, from input to output; at least two"
    )


class DigitsConfig(Section):
    """The 1797 images of handwritten digits (8 x 8 pixels) that come with scikit-learn."""

    kind: Literal["digits"] = "digits"
    batch_size: Count = Field(default=64, description="examples in a step, over all replicas")
    test_fraction: Fraction = Field(
        default=0.2, gt=0, description="part of the data kept for evaluation, in (0, 1)"
    )
    shift: CountOrZero = Field(
        default=1, le=7, description="training images are moved by up to this many pixels each way"
    )


class TextConfig(Section):
    """Bytes of text, cut into sequences of `model.length`."""

    kind: Literal["text"] = "text"
    source: Text = Field(
        default="topics",
        description="topics (Python's help texts), stdlib (the standard library's sources), "
        "or the path of a file",
    )
    batch_size: Count = Field(default=32, description="sequences in a step, over all replicas")
    test_fraction: Fraction = Field(
        default=0.1, gt=0, description="part of the text kept for evaluation, in (0, 1)"
    )


class MeshConfig(Section):
    """How many devices a run uses: stages x data of them."""

    stages: Count = Field(default=1, description="pipeline stages, one device each")
    data: Count = Field(
        default=1, description="replicas of the pipeline, each with a part of the batch"
    )
    simulate: Count | None = Field(
        default=None,
        description="number of CPU devices to simulate, for a machine without accelerators",
    )


class PipelineConfig(Section):
    """How a batch goes through the stages."""

    micro_batches: Count = Field(default=1, description="parts that a replica cuts its batch into")
    schedule: Literal["gpipe", "1f1b", "eager_1f1b"] = Field(
        default="1f1b", description="order of the work"
    )
    partition: Literal["auto"] | tuple[Count, ...] = Field(
        default="auto",
        description="auto (balanced cost), or the index of the first layer of stages 1 to K-1",
    )
    cost: Literal["flops", "time"] | tuple[PositiveOrZero, ...] = Field(
        default="flops",
        description="what auto balances: flops, measured time, or a cost for each layer",
    )
    memory_limit_gib: Positive | None = Field(
        default=None, description="memory of a device in GiB; auto keeps each stage below it"
    )
    remat: Literal["stage", "layer"] = Field(
        default="stage", description="what the backward pass recomputes at a time"
    )

    @field_validator("partition")
    @classmethod
    def _boundaries_increase(cls, partition: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(partition, str):
            return partition
        for left, right in pairwise(partition):
            if left >= right:
                raise ValueError(
                    f"boundaries must be strictly increasing, got {right} after {left} "
                    f"in {list(partition)}"
                )
        return partition


class OptimizerConfig(Section):
    """What every optimizer has."""

    kind: str
    learning_rate: Positive = Field(default=1e-3, description="peak learning rate")
    schedule: Literal["constant", "cosine", "exponential"] = Field(
        default="cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_steps: CountOrZero = Field(default=0, description="steps of linear warm-up from zero")
    decay_rate: Positive = Field(
        default=0.97, le=1, description="factor of the exponential schedule"
    )
    decay_steps: Count = Field(default=1000, description="steps in which that factor applies once")
    clip_norm: Positive | None = Field(
        default=None, description="largest global norm of the gradient"
    )
    weight_decay: PositiveOrZero = Field(
        default=0.0, description="decoupled weight decay; norms and biases are left out"
    )


class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: Fraction = Field(default=0.9, description="decay of the velocity, in [0, 1)")
    nesterov: bool = Field(default=False, description="use Nesterov's momentum")


class AdamConfig(OptimizerConfig):
    """Adam with decoupled weight decay; `adam` and `adamw` are two names of one optimizer."""

    kind: Literal["adamw", "adam"] = "adamw"
    b1: Fraction = Field(default=0.9, description="decay of the first moment, in [0, 1)")
    b2: Fraction = Field(default=0.999, description="decay of the second moment, in [0, 1)")
    eps: Positive = Field(default=1e-8, description="added to the denominator")


class RmsPropConfig(OptimizerConfig):
    """RMSProp with momentum, as used by AmoebaNet."""

    kind: Literal["rmsprop"] = "rmsprop"
    decay: Fraction = Field(default=0.9, description="decay of the second moment, in [0, 1)")
    eps: Positive = Field(default=1e-8, description="added to the denominator")
    momentum: Fraction = Field(default=0.9, description="decay of the velocity, in [0, 1)")


class TrainConfig(Section):
    """How long a run is, and where it writes."""

    steps: Count = Field(default=1000, description="optimizer steps in all")
    eval_every: Count = Field(default=200, description="steps between evaluations")
    log_every: Count = Field(default=10, description="steps between lines of metrics")
    seed: CountOrZero = Field(
        default=0, description="seed of parameters, dropout and the data's order"
    )
    workdir: Text | None = Field(
        default=None, description="folder of the run; default: runs/<name of the config file>"
    )


class Config(Section):
    """A whole run. `model` and `data` are required, the rest has defaults."""

    model: ConvNetConfig | TransformerConfig | MlpConfig = Field(
        discriminator="kind", description="the network"
    )
    data: DigitsConfig | TextConfig = Field(discriminator="kind", description="the data set")
    mesh: MeshConfig = Field(default=MeshConfig(), description="the devices")
    pipeline: PipelineConfig = Field(default=PipelineConfig(), description="the pipeline")
    optimizer: SgdConfig | AdamConfig | RmsPropConfig = Field(
        default=AdamConfig(), discriminator="kind", description="the optimizer"
    )
    train: TrainConfig = Field(default=TrainConfig(), description="the run")

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        # One error each, with its own location, where a plain ValueError would give one for all.
        problems = [
            InitErrorDetails(
                type=PydanticCustomError("cross_check", "{error}", {"error": message}),
                loc=tuple(name.split(".")),
                input=None,
            )
            for name, message in cross_checks(self)
        ]
        if problems:
            raise PydanticError.from_exception_data("Config", problems)
        return self


def section_models(section: str) -> dict[str, type[Section]]:
    """The models a section may have, by `kind`; by the empty string if it has no kinds."""
    annotation: Any = Config.model_fields[section].annotation
    models = get_args(annotation) or (annotation,)
    return {
        kind: model
        for model in models
        for kind in (get_args(model.model_fields["kind"].annotation) if len(models) > 1 else [""])
    }


def nearest_multiples(n: int, m: int) -> tuple[int, ...]:
    """The multiples of `m` next to `n`: the one below, unless that is zero, and the one above.

    >>> nearest_multiples(60, 16), nearest_multiples(5, 16)
    ((48, 64), (16,))
    """
    below = n // m * m
    return (below, below + m) if below else (m,)


def batch_problem(batch_size: int, *, data: int, micro_batches: int) -> str | None:
    """What is wrong with a batch that cannot be cut into equal micro-batches; None if it can."""
    unit = data * micro_batches
    if batch_size % unit == 0:
        return None
    legal = ", ".join(map(str, nearest_multiples(batch_size, unit)))
    return (
        f"batch_size {batch_size} is not a multiple of data x micro_batches = "
        f"{data} x {micro_batches} = {unit}; nearest legal values: {legal}"
    )


def cross_checks(config: Config) -> list[tuple[str, str]]:
    """Every rule between sections that `config` breaks: (dotted name, message)."""
    mesh, pipeline = config.mesh, config.pipeline
    found: list[tuple[str, str]] = []
    batch = batch_problem(
        config.data.batch_size, data=mesh.data, micro_batches=pipeline.micro_batches
    )
    if batch:
        found.append(("data.batch_size", batch))
    boundaries = pipeline.partition
    if not isinstance(boundaries, str) and len(boundaries) != mesh.stages - 1:
        message = (
            f"mesh.stages {mesh.stages} needs {mesh.stages - 1} boundaries, got {len(boundaries)}: "
            f"{list(boundaries)}; give {mesh.stages - 1}, or 'auto'"
        )
        found.append(("pipeline.partition", message))
    devices = mesh.stages * mesh.data
    if mesh.simulate is not None and mesh.simulate < devices:
        message = (
            f"simulate {mesh.simulate} is less than stages x data = "
            f"{mesh.stages} x {mesh.data} = {devices}; raise it to {devices}"
        )
        found.append(("mesh.simulate", message))
    return found + _data_checks(config)


def _data_checks(config: Config) -> list[tuple[str, str]]:
    """Whether the model can read the data."""
    model = config.model
    if isinstance(config.data, TextConfig) or isinstance(model, TransformerConfig):
        if isinstance(config.data, TextConfig) and isinstance(model, TransformerConfig):
            return []
        remedy = "data.kind text goes with transformer_lm, digits with convnet or mlp"
        message = f"model {model.kind!r} cannot read data {config.data.kind!r}; {remedy}"
        return [("model.kind", message)]
    if isinstance(model, MlpConfig):
        given = {"first of features": model.features[0], "last of features": model.features[-1]}
        names = ["model.features", "model.features"]
    else:
        given = {"in_channels": model.in_channels, "classes": model.classes}
        names = ["model.in_channels", "model.classes"]
    inputs = 64 if isinstance(model, MlpConfig) else 1
    reasons = [(inputs, "8 x 8 pixels of one channel"), (10, "ten classes")]
    return [
        (name, f"{what} {value} does not fit data 'digits' ({reason}); make it {legal}")
        for name, (what, value), (legal, reason) in zip(names, given.items(), reasons, strict=True)
        if value != legal
    ]
