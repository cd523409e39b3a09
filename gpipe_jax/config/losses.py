"""Define the sections of the losses."""

from typing import Any, ClassVar, Literal

from pydantic import Field

from gpipe_jax.config.base import Fraction, NamedCode, PositiveOrZero, Section
from gpipe_jax.config.calls import Arguments, Function


class LossConfig(Section):
    """Define what the sections of all losses have."""

    reads_floats: ClassVar[bool] = False  # labels may be any numbers, not only those of classes

    kind: str

    @property
    def ignored_label(self) -> int | None:
        """Return the label that the loss leaves out, if there is one."""
        return None

    def loss_arguments(self) -> dict[str, Any]:
        """Return the arguments of the loss's function."""
        return self.model_dump(exclude={"kind"})


class ModelLossConfig(LossConfig):
    """Use the loss that goes with the model: cross entropy, with what `model` says of it."""

    kind: Literal["model"] = "model"


class ClassificationConfig(LossConfig):
    """Use the cross entropy of integer labels; each example has the same share of the mean."""

    kind: Literal["classification"] = "classification"
    label_smoothing: Fraction = Field(
        default=0.0, description="part of the label that is spread over all classes, in [0, 1)"
    )
    auxiliary_weight: PositiveOrZero = Field(
        default=0.0,
        description="weight of the loss of a second output, (logits, auxiliary logits); 0: none",
    )


class TokenCrossEntropyConfig(LossConfig):
    """Use the cross entropy of tokens; each token of the batch has the same share of the mean."""

    kind: Literal["token_cross_entropy"] = "token_cross_entropy"
    label_smoothing: Fraction = Field(
        default=0.0, description="part of the label that is spread over all tokens, in [0, 1)"
    )
    z_loss: PositiveOrZero = Field(
        default=0.0, description="factor of log(Z)^2, where Z is the sum of exp(logits)"
    )
    ignore_index: int = Field(default=-100, description="label of tokens that do not count")

    @property
    def ignored_label(self) -> int | None:
        return self.ignore_index


class BinaryCrossEntropyConfig(LossConfig):
    """Use the cross entropy of independent outputs, whose labels are 0, 1 or between."""

    reads_floats: ClassVar[bool] = True

    kind: Literal["binary_cross_entropy"] = "binary_cross_entropy"
    label_smoothing: Fraction = Field(
        default=0.0, description="part of the way from a label to its opposite, in [0, 1)"
    )


class SquaredErrorConfig(LossConfig):
    """Use the squared error of each output; labels have the shape of the outputs."""

    reads_floats: ClassVar[bool] = True

    kind: Literal["squared_error"] = "squared_error"


class PythonLossConfig(LossConfig):
    """Use a function of your own: (outputs, labels) -> losses, or (losses, metrics)."""

    reads_floats: ClassVar[bool] = True

    kind: Literal["python"] = "python"
    function: Function = Field(
        description="the module or file and the function, as my_loss.py:loss; it is called with "
        "outputs and labels and the arguments, or is a class, which is called with the arguments"
    )
    arguments: Arguments = Field(default={}, description="further arguments, by name")

    def named_code(self) -> list[NamedCode]:
        return [NamedCode("function", self.function, self.arguments)]


AnyLossConfig = (
    ModelLossConfig
    | ClassificationConfig
    | TokenCrossEntropyConfig
    | BinaryCrossEntropyConfig
    | SquaredErrorConfig
    | PythonLossConfig
)
