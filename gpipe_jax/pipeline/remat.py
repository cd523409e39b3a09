"""Define the recomputation policies: what a backward pass stores, and what it computes again.

    policy   stored between the forward and the backward of a stage   forwards in a backward pass
    stage    what the vector-Jacobian product of each layer needs     1
    layer    the input of each layer                                  2

Each policy recomputes a stage from its stashed input (GPipe, section 2.3): this is the first of the
forwards. To add a policy, write a class here and its two passes in `stage_step.PASSES`, and add its
name to `utils.choices.REMAT`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from gpipe_jax.errors import ArgumentError
from gpipe_jax.partition.costs import LayerCost
from gpipe_jax.utils import choices

# The policy "stage" unrolls runs of up to this many equal layers. Longer ones are a `lax.scan`.
# A scan stacks what its backward pass stores: that cost 1.3 times the time on CPU and 1.25 times
# the memory on TPU v5p. But unrolling five layers in a stage took 3.7 times as long to compile.
MAX_UNROLL = 8


class Remat(ABC):
    """Describe what the backward pass of a stage stores and recomputes."""

    name: ClassVar[str]
    forwards: ClassVar[int]  # how often one backward pass computes the forward of each layer
    longest_unrolled: ClassVar[int]  # a longer run of equal layers becomes a `lax.scan`

    @abstractmethod
    def layer_bytes(self, cost: LayerCost, input_bytes: int) -> int:
        """Return the bytes that a stage stores for one layer, whose input has this size."""

    @abstractmethod
    def stage_bytes(
        self, costs: Sequence[LayerCost], input_bytes: Sequence[int], scanned: Sequence[int]
    ) -> int:
        """Return the working set of a stage's backward pass, in bytes.

        `costs` and `input_bytes` are those of its layers; `scanned` are the parameter bytes of each
        run that is a scan.
        """


class _Stage(Remat):
    """Recompute a stage once, and store what each of its layers needs to go back."""

    name, forwards, longest_unrolled = "stage", 1, MAX_UNROLL

    def layer_bytes(self, cost: LayerCost, input_bytes: int) -> int:
        del input_bytes
        return cost.working_bytes

    def stage_bytes(
        self, costs: Sequence[LayerCost], input_bytes: Sequence[int], scanned: Sequence[int]
    ) -> int:
        del input_bytes
        # The gradients of all layers of a scan exist at once, before they are added to the sums.
        gradients = max([*scanned, *(cost.parameter_bytes for cost in costs)])
        return sum(cost.working_bytes for cost in costs) + gradients


class _Layer(Remat):
    """Recompute a stage, store the inputs of its layers, and recompute each layer from its input.

    There is little to store, so every run of equal layers is a scan.
    """

    name, forwards, longest_unrolled = "layer", 2, 1

    def layer_bytes(self, cost: LayerCost, input_bytes: int) -> int:
        del cost
        return input_bytes

    def stage_bytes(
        self, costs: Sequence[LayerCost], input_bytes: Sequence[int], scanned: Sequence[int]
    ) -> int:
        del scanned  # a scan adds the gradients of each layer to the sums before the next layer's
        working = max(cost.working_bytes for cost in costs)
        return sum(input_bytes) + working + max(cost.parameter_bytes for cost in costs)


STAGE: Remat = _Stage()
LAYER: Remat = _Layer()
POLICIES = {policy.name: policy for policy in (STAGE, LAYER)}


def by_name(name: str) -> Remat:
    """Return the policy of this name; raise ValueError if there is none."""
    if name not in POLICIES:
        known = " or ".join(map(repr, choices.REMAT))
        raise ArgumentError("remat", f"`remat` must be {known}, got {name!r}")
    return POLICIES[name]
