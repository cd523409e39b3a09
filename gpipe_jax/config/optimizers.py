"""Define the sections of the optimizers."""

from typing import Literal

from pydantic import Field

from gpipe_jax.config.base import Count, CountOrZero, Fraction, Positive, PositiveOrZero, Section


class OptimizerConfig(Section):
    """Define what the sections of all optimizers have."""

    kind: str
    learning_rate: Positive = Field(default=1e-3, description="peak learning rate")
    schedule: Literal["constant", "cosine", "exponential"] = Field(
        default="cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_steps: CountOrZero = Field(default=0, description="steps of linear warm-up from zero")
    decay_rate: Positive = Field(
        default=0.97, le=1, description="factor of the exponential schedule"
    )
    decay_steps: Count = Field(
        default=1000, description="steps after the warm-up in which that factor applies once"
    )
    staircase: bool = Field(
        default=False, description="apply the factor at once after every decay_steps, not evenly"
    )
    clip_norm: Positive | None = Field(
        default=None, description="largest global norm of the gradient"
    )
    weight_decay: PositiveOrZero = Field(
        default=0.0, description="decoupled weight decay; norms and biases are left out"
    )
    l2: PositiveOrZero = Field(
        default=0.0,
        description="L2 regularization: this times the parameters is added to the gradient, before "
        "clipping; norms and biases are left out",
    )
    ema: Fraction | None = Field(
        default=None,
        description="decay of the moving average of the parameters, which is then evaluated",
    )

    def unused(self) -> dict[str, str]:
        if self.schedule == "exponential":
            return {}
        fields = ("decay_rate", "decay_steps", "staircase")
        return dict.fromkeys(fields, f"schedule {self.schedule}")


class SgdConfig(OptimizerConfig):
    """Use stochastic gradient descent with momentum."""

    kind: Literal["sgd"] = "sgd"
    momentum: Fraction = Field(default=0.9, description="decay of the velocity, in [0, 1)")
    nesterov: bool = Field(default=False, description="use Nesterov's momentum")


class AdamConfig(OptimizerConfig):
    """Use Adam with decoupled weight decay; `adam` and `adamw` are two names of one optimizer."""

    kind: Literal["adamw", "adam"] = "adamw"
    b1: Fraction = Field(default=0.9, description="decay of the first moment, in [0, 1)")
    b2: Fraction = Field(default=0.999, description="decay of the second moment, in [0, 1)")
    eps: Positive = Field(default=1e-8, description="added to the denominator")


class RmsPropConfig(OptimizerConfig):
    """Use RMSProp with momentum as in TensorFlow; the defaults are AmoebaNet's for ImageNet.

    AmoebaNet-D was trained with eps 1.0 (tensorflow/tpu, models/official/amoeba_net).
    """

    kind: Literal["rmsprop"] = "rmsprop"
    decay: Fraction = Field(default=0.9, description="decay of the mean square, in [0, 1)")
    eps: Positive = Field(default=0.1, description="added to the mean square, inside the root")
    initial: PositiveOrZero = Field(
        default=1.0, description="mean square before the first step; TensorFlow's is 1"
    )
    momentum: Fraction = Field(default=0.9, description="decay of the velocity, in [0, 1)")


AnyOptimizerConfig = SgdConfig | AdamConfig | RmsPropConfig
