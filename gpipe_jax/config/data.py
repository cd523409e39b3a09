"""The data sets, and whether a model can read them."""

from typing import Literal

from pydantic import Field

from gpipe_jax.config.base import Count, CountOrZero, Fraction, Section, Text
from gpipe_jax.config.models import MlpConfig, ModelConfig, TransformerConfig


class DigitsConfig(Section):
    """The 1797 images of handwritten digits (8 x 8 pixels) that come with scikit-learn."""

    kind: Literal["digits"] = "digits"
    batch_size: Count = Field(default=64, description="examples in a step, over all replicas")
    test_fraction: Fraction = Field(
        default=0.2, gt=0, description="part of the data kept for evaluation, in (0, 1)"
    )
    shift: CountOrZero = Field(
        default=1, lt=8, description="training images are moved by up to this many pixels each way"
    )


class TextConfig(Section):
    """Bytes of text, cut into sequences of `model.length`."""

    kind: Literal["text"] = "text"
    source: Text = Field(
        default="topics",
        description="topics (Python's help texts), stdlib (the standard library's sources), "
        "the path of a file, or a glob",
    )
    batch_size: Count = Field(default=32, description="sequences in a step, over all replicas")
    test_fraction: Fraction = Field(
        default=0.1, gt=0, description="part of the text kept for evaluation, in (0, 1)"
    )


class Cifar10Config(Section):
    """CIFAR-10: 60,000 colour images of 32 x 32 pixels in ten classes, from a local folder."""

    kind: Literal["cifar10"] = "cifar10"
    folder: Text | None = Field(
        default=None,
        description="folder of the downloaded files; default: the environment variable "
        "GPIPE_JAX_DATA",
    )
    batch_size: Count = Field(default=128, description="examples in a step, over all replicas")
    validation: CountOrZero = Field(
        default=0,
        lt=50_000,
        description="training images to evaluate on in place of the test images; 0: the latter",
    )
    cutout: CountOrZero = Field(
        default=0,
        lt=33,
        description="a square of this many pixels each way is cut out of training images",
    )


class SyntheticImagesConfig(Section):
    """Noise of any size, to see whether a large network fits and how fast it is."""

    kind: Literal["synthetic_images"] = "synthetic_images"
    image: Count = Field(default=224, description="pixels each way; there are three channels")
    classes: Count = Field(default=1000, description="number of classes")
    batch_size: Count = Field(default=64, description="examples in a step, over all replicas")


class SyntheticTokensConfig(Section):
    """Random tokens, in sequences of `model.length`, for the same purpose."""

    kind: Literal["synthetic_tokens"] = "synthetic_tokens"
    vocabulary: Count = Field(
        default=256, description="number of tokens; at most the model's vocabulary"
    )
    batch_size: Count = Field(default=32, description="sequences in a step, over all replicas")


class ArraysConfig(Section):
    """Arrays from files: `inputs` and `labels`, whose first axis is the examples."""

    kind: Literal["arrays"] = "arrays"
    train: Text = Field(
        description="a .npz file with arrays inputs and labels, or a folder with inputs.npy and "
        "labels.npy, which are memory-mapped"
    )
    test: Text | None = Field(
        default=None, description="the same for evaluation; default: test_fraction of train"
    )
    batch_size: Count = Field(default=64, description="examples in a step, over all replicas")
    test_fraction: Fraction = Field(
        default=0.1, gt=0, description="part of train kept for evaluation if there is no test"
    )


class ArrayRecordConfig(ArraysConfig):
    """array_record files whose records are .npz files of one example each."""

    kind: Literal["array_record"] = "array_record"  # type: ignore[assignment]
    train: Text = Field(description="the path of an array_record file, or a glob")


class PythonConfig(Section):
    """What a function of a Python file makes: anything that iterates."""

    kind: Literal["python"] = "python"
    source: Text = Field(
        description="the file and the function, as my_data.py:make; it is called with batch_size "
        "and seed, and makes a gpipe_jax.data.Dataset"
    )
    batch_size: Count = Field(default=64, description="examples in a step, over all replicas")


DataConfig = (
    DigitsConfig
    | TextConfig
    | Cifar10Config
    | ArraysConfig
    | ArrayRecordConfig
    | PythonConfig
    | SyntheticImagesConfig
    | SyntheticTokensConfig
)
FromFiles = ArraysConfig | ArrayRecordConfig | PythonConfig  # what they hold is in the files


def image_shape(data: DataConfig) -> tuple[int, int, int] | None:
    """(pixels each way, channels, classes) of a data set of images; None for one of tokens."""
    if isinstance(data, DigitsConfig):
        return 8, 1, 10
    if isinstance(data, Cifar10Config):
        return 32, 3, 10
    if isinstance(data, SyntheticImagesConfig):
        return data.image, 3, data.classes
    return None


def data_problems(model: ModelConfig, data: DataConfig) -> list[tuple[str, str]]:
    """Why the model cannot read the data: (dotted name, message) of each reason."""
    if isinstance(data, FromFiles):
        return []
    shape = image_shape(data)
    if isinstance(model, TransformerConfig) != (shape is None):
        message = (
            f"model {model.kind!r} cannot read data {data.kind!r}; data.kind text and "
            f"synthetic_tokens go with transformer_lm, those of images with the other models"
        )
        return [("model.kind", message)]
    if shape is not None:
        return _image_problems(model, data.kind, *shape)
    known = getattr(model, "vocabulary", 0)
    if isinstance(data, SyntheticTokensConfig) and data.vocabulary > known:
        message = f"vocabulary {data.vocabulary} is more than model.vocabulary {known}"
        return [("data.vocabulary", f"{message}; use {known} or less")]
    if isinstance(data, TextConfig) and known < 256:
        message = f"vocabulary {known} is less than the 256 values of a byte; use 256 or more"
        return [("model.vocabulary", message)]
    return []


def _image_problems(
    model: ModelConfig, data: str, size: int, channels: int, classes: int
) -> list[tuple[str, str]]:
    """Why the model does not take these images, or does not know these classes."""
    images, kinds = f"{size} x {size} x {channels} images", f"{classes} classes"
    if isinstance(model, MlpConfig):
        first, last = model.features[0], model.features[-1]
        rules = [
            ("features", "first of features", first, size * size * channels, images),
            ("features", "last of features", last, classes, kinds),
        ]
    else:  # a model without the setting takes any
        rules = [
            (name, name, getattr(model, name, legal), legal, reason)
            for name, legal, reason in [
                ("image", size, images),
                ("in_channels", channels, images),
                ("classes", classes, kinds),
            ]
        ]
    return [
        (
            f"model.{name}",
            f"{what} {value} does not fit data {data!r} ({reason}); make it {legal}",
        )
        for name, what, value, legal, reason in rules
        if value != legal
    ]
