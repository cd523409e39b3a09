"""The networks: what the functions of `zoo` take, and what their losses do."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from gpipe_jax.config.base import Count, Depth, Fraction, PositiveOrZero, Section, Text
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import Genotype, is_json
from gpipe_jax.utils.text import nearest_multiples


class ConvNetConfig(Section):
    """A residual network for small images."""

    kind: Literal["convnet"] = "convnet"
    widths: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        default=(16, 32, 64), description="channels of each group of residual blocks"
    )
    depths: tuple[Depth, ...] = Field(
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


class ResNetConfig(Section):
    """ResNet-101, or of other depths, with batch norm."""

    kind: Literal["resnet"] = "resnet"
    depths: Annotated[tuple[Depth, ...], Field(min_length=1)] = Field(
        default=(3, 4, 23, 3), description="bottlenecks in each group; [3, 4, 6, 3] is ResNet-50"
    )
    width: Count = Field(
        default=64, description="inner features of the first group; they double with each group"
    )
    stem: Literal["imagenet", "small"] = Field(
        default="imagenet", description="imagenet divides the resolution by 4, small keeps it"
    )
    classes: Count = Field(default=1000, description="number of classes")
    in_channels: Count = Field(default=3, description="channels of the input images")
    label_smoothing: Fraction = Field(
        default=0.0, description="part of the label that is spread over all classes, in [0, 1)"
    )


class AmoebaNetConfig(Section):
    """A network of the cells of a genotype, each of them a layer."""

    kind: Literal["amoebanet"] = "amoebanet"
    genotype: Text = Field(
        default="D",
        description="A, B, C or D, what Genotype.to_json writes, or the path of a .json file of it",
    )
    layers: Depth = Field(
        default=18, description="normal cells, in three equal stacks; a multiple of 3"
    )
    filters: Count = Field(
        default=256, description="features of the first stack; they double with each stack"
    )
    image: Count = Field(default=224, description="pixels each way of the input images")
    classes: Count = Field(default=1000, description="number of classes")
    stem: Literal["imagenet", "torchgpipe", "cifar"] = Field(
        default="imagenet",
        description="first convolution: imagenet and torchgpipe divide the resolution by 8 with "
        "two more reduction cells, cifar keeps it",
    )
    in_channels: Count = Field(default=3, description="channels of the input images")
    auxiliary_weight: PositiveOrZero = Field(
        default=0.0,
        description="weight of the loss of a second classifier, behind the second stack; 0: none",
    )
    drop_path: Fraction = Field(
        default=0.0,
        description="probability of dropping an operation in the last cell at the end of training",
    )
    dropout: Fraction = Field(
        default=0.0, description="probability of dropping a feature before the classifier"
    )
    batch_norm_momentum: Fraction = Field(
        default=0.9997, description="decay of the running statistics of batch norm"
    )
    sync_batch_norm: bool = Field(
        default=False, description="batch norm over the micro-batches of all replicas"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="type of the activations; parameters stay in float32"
    )
    label_smoothing: Fraction = Field(
        default=0.0, description="part of the label that is spread over all classes, in [0, 1)"
    )

    @field_validator("genotype")
    @classmethod
    def _letter_json_or_file(cls, genotype: str) -> str:
        if is_json(genotype):
            Genotype.from_json(genotype)  # ValueError says what is wrong with it
        elif genotype not in GENOTYPES and not genotype.endswith(".json"):
            raise ValueError(
                f"got {genotype!r}, but the published ones are {', '.join(GENOTYPES)}; give one "
                f"of these letters, or what Genotype.to_json writes or the path of a .json file "
                f"of it"
            )
        return genotype

    @field_validator("layers")
    @classmethod
    def _three_stacks(cls, layers: int) -> int:
        if layers % 3:
            legal = ", ".join(map(str, nearest_multiples(layers, 3)))
            raise ValueError(
                f"must be a multiple of 3, as there are three equal stacks, got {layers}; "
                f"nearest legal values: {legal}"
            )
        return layers


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
    layers: Depth = Field(default=4, description="number of transformer blocks")
    positions: Literal["learned", "sinusoidal"] = Field(
        default="learned",
        description="how a token knows its place: learned has parameters, sinusoidal none",
    )
    tied: bool = Field(
        default=False, description="the head uses the embedding's table and has none of its own"
    )
    halves: bool = Field(
        default=False,
        description="a block is two layers, attention and feed-forward, for more even stages",
    )
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


ModelConfig = ConvNetConfig | ResNetConfig | AmoebaNetConfig | TransformerConfig | MlpConfig
