"""What the fields of all sections are made of."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
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


# A field bounds a count further with `lt`: pydantic would let the `le` here win over another one.
Count = Annotated[int, Field(ge=1, le=LARGEST), BeforeValidator(_whole)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST), BeforeValidator(_whole)]
# Of layers and the like, each of which is an object here.
Depth = Annotated[int, Field(ge=1, le=100_000), BeforeValidator(_whole)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_real)]
PositiveOrZero = Annotated[float, Field(ge=0), BeforeValidator(_real)]
Fraction = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_real)]
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of every model here: immutable, no unknown keys, only finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )


def cross_check(name: str, message: str) -> InitErrorDetails:
    """What is wrong between sections, as an error of pydantic with its own place."""
    error = PydanticCustomError("cross_check", "{error}", {"error": message})
    return InitErrorDetails(type=error, loc=tuple(name.split(".")), input=None)
