"""Define the sections of the networks: arguments of the functions in `zoo`, and of their losses.

To add a network, write a subclass of `ModelConfig` and add it to `AnyModelConfig`. Its `kind` is
the network's name in `zoo.MODELS`.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, ValidationInfo, field_validator

from gpipe_jax.config.base import (
    Count,
    Depth,
    Fraction,
    LocalPath,
    NamedCode,
    Pattern,
    PositiveOrZero,
    Section,
)
from gpipe_jax.config.calls import Arguments, Function
from gpipe_jax.errors import ArgumentError
from gpipe_jax.genotypes.amoebanet import GENOTYPES
from gpipe_jax.genotypes.genotype import Genotype, is_json
from gpipe_jax.utils import paths
from gpipe_jax.utils.text import nearest_multiples


class ImageShape(NamedTuple):
    """Describe the images of a data set."""

    size: int  # pixels each way
    channels: int
    classes: int


class SizeRule(NamedTuple):
    """Say which value a setting must have for a data set of images."""

    field: str
    words: str  # the setting in a message
    value: int
    legal: int
    reason: str


class ModelConfig(Section):
    """Define what the sections of all networks have."""

    reads_tokens: ClassVar[bool] = False  # or images
    _loss_fields: ClassVar[tuple[str, ...]] = ()  # fields that the loss takes, not the network

    kind: str
    trainable: tuple[Pattern, ...] | None = Field(
        default=None,
        description="patterns of the parameters to train, such as '9' or '*.bias'; default: all",
    )
    frozen: tuple[Pattern, ...] | None = Field(
        default=None, description="patterns of the parameters not to train, instead of trainable"
    )

    @field_validator("frozen")
    @classmethod
    def _one_of_the_two(
        cls, frozen: tuple[str, ...] | None, info: ValidationInfo
    ) -> tuple[str, ...] | None:
        if frozen is not None and info.data.get("trainable") is not None:
            raise ValueError(
                "give trainable or frozen, not both: what one does not match belongs to the other"
            )
        return frozen

    @property
    def training_arguments(self) -> dict[str, tuple[str, ...] | None]:
        """Return the arguments of `Pipeline` that say what is trained."""
        return {"trainable": self.trainable, "frozen": self.frozen}

    @property
    def num_labels(self) -> int | None:
        """Return the number of different labels that the network can predict, if it is known."""
        raise NotImplementedError

    @property
    def sequence_length(self) -> int | None:
        """Return the tokens in a sequence; None for a network of images."""
        return None

    @property
    def has_dropout(self) -> bool:
        """Return whether training draws random numbers."""
        return False

    def accepts(self, *, tokens: bool) -> bool:
        """Return whether the network can read tokens, or else images."""
        return self.reads_tokens == tokens

    def network_arguments(self) -> dict[str, Any]:
        """Return the arguments of the network's function in `zoo.MODELS`."""
        others = {"kind", *self.training_arguments, *self._loss_fields}
        return self.model_dump(exclude=others)

    def loss_arguments(self) -> dict[str, float]:
        """Return the arguments of `losses.classification`."""
        return self.model_dump(include=set(self._loss_fields))

    def size_rules(self, images: ImageShape) -> list[SizeRule]:
        """Return which settings must have which values for these images."""
        raise NotImplementedError


def _what(images: ImageShape) -> tuple[str, str]:
    size, channels, classes = images
    return f"{size} x {size} x {channels} images", f"{classes} classes"


class _ImageModelConfig(ModelConfig):
    """Define what the sections of networks of images have."""

    if TYPE_CHECKING:  # each subclass declares them, in its own order of fields
        classes: int
        in_channels: int

    @property
    def num_labels(self) -> int:
        return self.classes

    def size_rules(self, images: ImageShape) -> list[SizeRule]:
        pixels, labels = _what(images)
        return [
            SizeRule("in_channels", "in_channels", self.in_channels, images.channels, pixels),
            SizeRule("classes", "classes", self.classes, images.classes, labels),
        ]


class ConvNetConfig(_ImageModelConfig):
    """Use a residual network for small images."""

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
    def _one_depth_per_width(cls, depths: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        widths = info.data.get("widths", depths)
        if len(widths) != len(depths):
            raise ValueError(
                f"needs one entry for each of model.widths: {len(depths)} depths {list(depths)}, "
                f"{len(widths)} widths {list(widths)}; give as many depths as widths"
            )
        return depths


class ResNetConfig(_ImageModelConfig):
    """Use ResNet-101, or a ResNet of other depths, with batch norm."""

    _loss_fields: ClassVar[tuple[str, ...]] = ("label_smoothing",)

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


class AmoebaNetConfig(_ImageModelConfig):
    """Use a network of the cells of a genotype; each cell is a layer."""

    _loss_fields: ClassVar[tuple[str, ...]] = ("auxiliary_weight", "label_smoothing")

    kind: Literal["amoebanet"] = "amoebanet"
    genotype: LocalPath = Field(
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

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0 or self.drop_path > 0

    def network_arguments(self) -> dict[str, Any]:
        """Return the arguments of `zoo.amoebanet`; reads the genotype's file, if it is one."""
        return {
            **super().network_arguments(),
            "genotype": _read_genotype(self.genotype),
            "auxiliary": self.auxiliary_weight > 0,
        }

    def size_rules(self, images: ImageShape) -> list[SizeRule]:
        pixels, _ = _what(images)
        image = SizeRule("image", "image", self.image, images.size, pixels)
        return [image, *super().size_rules(images)]


def _read_genotype(source: str) -> Genotype:
    if source in GENOTYPES:
        return GENOTYPES[source]
    if is_json(source):
        return Genotype.from_json(source)
    try:
        return Genotype.from_json(paths.local("genotype", source).read_text(encoding="utf-8"))
    except ArgumentError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ArgumentError(
            "genotype",
            f"`genotype` {source} cannot be read ({reason}); give a file that Genotype.to_json "
            f"wrote, or one of {', '.join(GENOTYPES)}",
        ) from error


class TransformerConfig(ModelConfig):
    """Use a decoder-only language model."""

    reads_tokens: ClassVar[bool] = True

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
        description="how a token's position is encoded: learned has parameters, sinusoidal none",
    )
    tied: bool = Field(
        default=False,
        description="whether the head uses the embedding's table, instead of a second one",
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

    @property
    def num_labels(self) -> int:
        return self.vocabulary

    @property
    def sequence_length(self) -> int:
        return self.length

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0


class MlpConfig(ModelConfig):
    """Use dense layers with a nonlinearity between them."""

    kind: Literal["mlp"] = "mlp"
    features: Annotated[tuple[Count, ...], Field(min_length=2)] = Field(
        default=(64, 128, 128, 10), description="layer widths, from input to output; at least two"
    )

    @property
    def num_labels(self) -> int:
        return self.features[-1]

    def size_rules(self, images: ImageShape) -> list[SizeRule]:
        pixels, labels = _what(images)
        first, last = self.features[0], self.features[-1]
        size = images.size**2 * images.channels
        return [
            SizeRule("features", "first of features", first, size, pixels),
            SizeRule("features", "last of features", last, images.classes, labels),
        ]


class PythonModelConfig(ModelConfig):
    """Call a function of your own, which returns the network as a list of layers."""

    kind: Literal["python"] = "python"
    function: Function = Field(
        description="the module or file and the function, as my_model.py:layers; it is called with "
        "the arguments and returns a list of layers"
    )
    arguments: Arguments = Field(default={}, description="arguments of the function, by name")
    length: Count | None = Field(
        default=None, description="tokens in a training sequence, for data of tokens"
    )
    classes: Count | None = Field(
        default=None, description="number of labels (or tokens), to check the data; default: any"
    )

    def named_code(self) -> list[NamedCode]:
        return [NamedCode("function", self.function, self.arguments)]

    @property
    def num_labels(self) -> int | None:
        return self.classes

    @property
    def sequence_length(self) -> int | None:
        return self.length

    def accepts(self, *, tokens: bool) -> bool:
        return not tokens or self.length is not None

    def size_rules(self, images: ImageShape) -> list[SizeRule]:
        if self.classes is None:
            return []
        return [SizeRule("classes", "classes", self.classes, images.classes, _what(images)[1])]


AnyModelConfig = (
    ConvNetConfig
    | ResNetConfig
    | AmoebaNetConfig
    | TransformerConfig
    | MlpConfig
    | PythonModelConfig
)
