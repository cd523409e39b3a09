"""Define the sections of the data sets: arguments of the functions in `data`.

To add a data set, write a subclass of `DataConfig` and add it to `AnyDataConfig`. Its `kind` is the
data set's name in `data.DATASETS`.
"""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field

from gpipe_jax.config.base import (
    Count,
    CountOrZero,
    Fraction,
    LocalPath,
    NamedCode,
    Problems,
    Section,
)
from gpipe_jax.config.calls import Arguments
from gpipe_jax.config.losses import LossConfig
from gpipe_jax.config.models import (
    AnyModelConfig,
    ImageShape,
    ModelConfig,
    PythonModelConfig,
)
from gpipe_jax.data.rules import Rules
from gpipe_jax.utils.choices import FOLDER_VARIABLE


class DataConfig(Section):
    """Define what the sections of all data sets have."""

    holds_tokens: ClassVar[bool] = False  # or images
    is_bytes: ClassVar[bool] = (
        False  # each token is a byte: the loss is also reported in bits per byte
    )
    in_files: ClassVar[bool] = False  # shapes and classes are in the files, and read with them
    file_field: ClassVar[str | None] = None  # the field with the path of the data

    kind: str
    if TYPE_CHECKING:  # each subclass declares it, in its own order of fields
        batch_size: int

    def images(self) -> ImageShape | None:
        """Return the size of the images; None for tokens, and if only the files say it."""
        return None

    def dataset_arguments(self, model: ModelConfig) -> dict[str, Any]:
        """Return the arguments of the data set's function in `data.DATASETS`, but for the seed."""
        return self.model_dump(exclude={"kind"})

    def problems(self, model: ModelConfig) -> Problems:
        """Return why a network cannot read this data set, if both are of images or of tokens."""
        images = self.images()
        return [
            (
                f"model.{rule.field}",
                f"{rule.words} {rule.value} does not fit data {self.kind!r} ({rule.reason}); "
                f"make it {rule.legal}",
            )
            for rule in (model.size_rules(images) if images else ())
            if rule.value != rule.legal
        ]


class DigitsConfig(DataConfig):
    """Use the 1797 images of handwritten digits (8 x 8 pixels) that come with scikit-learn."""

    kind: Literal["digits"] = "digits"
    batch_size: Count = Field(default=64, description="examples in a step, over all replicas")
    test_fraction: Fraction = Field(
        default=0.2, gt=0, description="part of the data kept for evaluation, in (0, 1)"
    )
    shift: CountOrZero = Field(
        default=1, lt=8, description="training images are moved by up to this many pixels each way"
    )

    def images(self) -> ImageShape:
        return ImageShape(size=8, channels=1, classes=10)


class TextConfig(DataConfig):
    """Use the bytes of a text, cut into sequences of `model.length`."""

    holds_tokens: ClassVar[bool] = True
    is_bytes: ClassVar[bool] = True
    file_field: ClassVar[str | None] = "source"

    kind: Literal["text"] = "text"
    source: LocalPath = Field(
        default="topics",
        description="topics (Python's help texts), stdlib (the standard library's sources), "
        "the path of a file, or a glob",
    )
    batch_size: Count = Field(default=32, description="sequences in a step, over all replicas")
    test_fraction: Fraction = Field(
        default=0.1, gt=0, description="part of the text kept for evaluation, in (0, 1)"
    )

    def dataset_arguments(self, model: ModelConfig) -> dict[str, Any]:
        return {**super().dataset_arguments(model), "length": model.sequence_length}

    def problems(self, model: ModelConfig) -> Problems:
        known = model.num_labels
        if known is None or known >= 256:
            return []
        message = f"vocabulary {known} is less than the 256 values of a byte; use 256 or more"
        return [("model.vocabulary", message)]


class Cifar10Config(DataConfig):
    """Use CIFAR-10 from a local folder: 60,000 colour images, 32 x 32 pixels, ten classes."""

    file_field: ClassVar[str | None] = "folder"

    kind: Literal["cifar10"] = "cifar10"
    folder: LocalPath | None = Field(
        default=None,
        description="folder of the downloaded files; default: the environment variable "
        f"{FOLDER_VARIABLE}",
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

    def images(self) -> ImageShape:
        return ImageShape(size=32, channels=3, classes=10)


class SyntheticImagesConfig(DataConfig):
    """Use noise of any size, to see whether a large network fits and how fast it is."""

    kind: Literal["synthetic_images"] = "synthetic_images"
    image: Count = Field(default=224, description="pixels each way; there are three channels")
    classes: Count = Field(default=1000, description="number of classes")
    batch_size: Count = Field(default=64, description="examples in a step, over all replicas")

    def images(self) -> ImageShape:
        return ImageShape(self.image, channels=3, classes=self.classes)


class SyntheticTokensConfig(DataConfig):
    """Use random tokens in sequences of `model.length`, for the same purpose."""

    holds_tokens: ClassVar[bool] = True

    kind: Literal["synthetic_tokens"] = "synthetic_tokens"
    vocabulary: Count = Field(
        default=256, description="number of tokens; at most the model's vocabulary"
    )
    batch_size: Count = Field(default=32, description="sequences in a step, over all replicas")

    def dataset_arguments(self, model: ModelConfig) -> dict[str, Any]:
        return {**super().dataset_arguments(model), "length": model.sequence_length}

    def problems(self, model: ModelConfig) -> Problems:
        known = model.num_labels
        if known is None or self.vocabulary <= known:
            return []
        message = f"vocabulary {self.vocabulary} is more than model.vocabulary {known}"
        return [("data.vocabulary", f"{message}; use {known} or less")]


class ArraysConfig(DataConfig):
    """Read arrays from files: `inputs` and `labels`, whose first axis is the examples."""

    in_files: ClassVar[bool] = True
    file_field: ClassVar[str | None] = "train"

    kind: Literal["arrays"] = "arrays"
    train: LocalPath = Field(
        description="a .npz file with arrays inputs and labels, or a folder with inputs.npy and "
        "labels.npy, which are memory-mapped"
    )
    test: LocalPath | None = Field(
        default=None, description="the same for evaluation; default: test_fraction of train"
    )
    batch_size: Count = Field(default=64, description="examples in a step, over all replicas")
    test_fraction: Fraction = Field(
        default=0.1, gt=0, description="part of train kept for evaluation if there is no test"
    )

    def unused(self) -> dict[str, str]:
        return {} if self.test is None else {"test_fraction": f"test {self.test}"}


class ArrayRecordConfig(ArraysConfig):
    """Read array_record files whose records are .npz files of one example each."""

    kind: Literal["array_record"] = "array_record"  # type: ignore[assignment]
    train: LocalPath = Field(description="the path of an array_record file, or a glob")


class PythonConfig(DataConfig):
    """Call a function of your own, which returns a data set of anything that iterates."""

    in_files: ClassVar[bool] = True
    file_field: ClassVar[str | None] = "source"

    kind: Literal["python"] = "python"
    source: LocalPath = Field(
        description="the file and the function, as my_data.py:make; the file is run, and the "
        "function is called with batch_size and seed and returns a gpipe_jax.data.Dataset"
    )
    arguments: Arguments = Field(default={}, description="further arguments, by name")
    batch_size: Count = Field(default=64, description="examples in a step, over all replicas")

    def named_code(self) -> list[NamedCode]:
        return [NamedCode("source", self.source, self.arguments)]


AnyDataConfig = (
    DigitsConfig
    | TextConfig
    | Cifar10Config
    | ArraysConfig
    | ArrayRecordConfig
    | PythonConfig
    | SyntheticImagesConfig
    | SyntheticTokensConfig
)


def example_rules(model: ModelConfig, loss: LossConfig) -> Rules:
    """Return what a network and its loss require of examples from files."""
    tokens = model.reads_tokens or model.sequence_length is not None
    return Rules(tokens, model.num_labels, loss.reads_floats, loss.ignored_label)


def model_reads_data(model: AnyModelConfig, data: AnyDataConfig) -> Problems:
    """Return why the network cannot read the data set."""
    if data.in_files:
        return []
    if model.accepts(tokens=data.holds_tokens):
        return data.problems(model)
    if isinstance(model, PythonModelConfig):
        message = f"data {data.kind!r} has tokens in sequences; give the tokens in a sequence"
        return [("model.length", message)]
    tokens = [c.model_fields["kind"].default for c in get_args(AnyDataConfig) if c.holds_tokens]
    readers = [c.model_fields["kind"].default for c in get_args(AnyModelConfig) if c.reads_tokens]
    message = (
        f"model {model.kind!r} cannot read data {data.kind!r}; data.kind {' and '.join(tokens)} "
        f"go with {' and '.join(readers)}, those of images with the other models"
    )
    return [("model.kind", message)]
