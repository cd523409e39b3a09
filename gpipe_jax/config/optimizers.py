"""Define the sections of the optimizers."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from gpipe_jax.config.base import (
    Count,
    CountOrZero,
    Fraction,
    NamedCode,
    Pattern,
    Positive,
    PositiveOrZero,
    Section,
)
from gpipe_jax.config.calls import Arguments, Function


class OptimizerGroup(Section):
    """Give some parameters settings of their own."""

    match: Annotated[tuple[Pattern, ...], Field(min_length=1)] = Field(
        description="patterns of the parameters, as in model.frozen"
    )
    learning_rate: Positive | None = Field(default=None, description="their peak learning rate")
    weight_decay: PositiveOrZero | None = Field(
        default=None, description="their decoupled weight decay; norms and biases are left out"
    )
    l2: PositiveOrZero | None = Field(
        default=None, description="their L2 regularization; norms and biases are left out"
    )

    @property
    def settings(self) -> dict[str, float]:
        """Return the settings that the group replaces."""
        return self.model_dump(exclude={"match"}, exclude_none=True)

    @model_validator(mode="after")
    def _sets_something(self) -> Self:
        if not self.settings:
            raise ValueError(
                "sets nothing for the parameters that it matches; give learning_rate, "
                "weight_decay or l2, or remove the group"
            )
        return self


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
    groups: tuple[OptimizerGroup, ...] = Field(
        default=(),
        description="settings of some parameters, as {match: [patterns], learning_rate: ...}; of "
        "several groups that match a parameter, the first one counts",
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


class LionConfig(OptimizerConfig):
    """Use Lion: the sign of a moving average, with one number per parameter."""

    kind: Literal["lion"] = "lion"
    b1: Fraction = Field(default=0.9, description="decay of the average in an update, in [0, 1)")
    b2: Fraction = Field(default=0.99, description="decay of the average that is kept, in [0, 1)")


class MuonConfig(OptimizerConfig):
    """Use Muon for arrays of two axes: the velocity, made orthogonal. Use Adam for all others.

    As `optax.contrib.muon`. Embeddings of two axes count as matrices too.
    """

    kind: Literal["muon"] = "muon"
    momentum: Fraction = Field(default=0.95, description="decay of the velocity, in [0, 1)")
    nesterov: bool = Field(default=True, description="use Nesterov's momentum")
    ns_steps: Count = Field(default=5, description="iterations of Newton and Schulz")
    b1: Fraction = Field(default=0.9, description="decay of Adam's first moment, in [0, 1)")
    b2: Fraction = Field(default=0.999, description="decay of Adam's second moment, in [0, 1)")


class PythonOptimizerConfig(OptimizerConfig):
    """Call a function of your own, or of optax, which returns an optax transformation.

    The other settings act around it, as around the other kinds.
    """

    kind: Literal["python"] = "python"
    function: Function = Field(
        description="the module or file and the function, as optax:adabelief; it is called with "
        "learning_rate, a function of the step, and the arguments"
    )
    arguments: Arguments = Field(default={}, description="further arguments, by name")

    def named_code(self) -> list[NamedCode]:
        return [NamedCode("function", self.function, self.arguments)]


AnyOptimizerConfig = (
    SgdConfig | AdamConfig | RmsPropConfig | LionConfig | MuonConfig | PythonOptimizerConfig
)

REFUSED = {
    "adafactor": "adafactor keeps sums over rows and columns, which a checkpoint cannot cut by "
    "layers; use lion, with one number per parameter",
    "lamb": "lamb is no kind; write kind: python, function: optax:lamb",
    "lars": "lars is no kind; write kind: python, function: optax:lars",
}
"""Name optimizers that are no kinds, with the reason and what to use."""
