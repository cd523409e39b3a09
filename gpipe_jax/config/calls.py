"""Define the settings that name a function of the user's own code, and its arguments."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from gpipe_jax import own_code
from gpipe_jax.config.base import Section, Text

# YAML 1.1 reads 3e-4 as a text, which a setting of a known type would convert.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+")


def _names_a_function(reference: str) -> str:
    problem = own_code.problem(reference)
    if problem is not None:
        raise ValueError(problem)
    return reference


def _with_numbers(value: Any) -> Any:
    """Return a value with numbers in place of texts such as "3e-4", also within it."""
    if isinstance(value, dict):
        return {name: _with_numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    is_number = isinstance(value, str) and _NUMBER.fullmatch(value)
    return float(value) if is_number else value


Function = Annotated[Text, AfterValidator(_names_a_function)]
Arguments = Annotated[dict[str, Any], BeforeValidator(_with_numbers)]


class NamedCall(Section):
    """Name a function or a class, and its arguments."""

    function: Function = Field(description="module:function, beside the config or installed")
    arguments: Arguments = Field(default={}, description="arguments of the function, by name")


class NamedMetric(NamedCall):
    """Name a metric: a function, its arguments, and its name in the records."""

    name: Text | None = Field(
        default=None, description="its name among the metrics; default: that of the function"
    )

    @property
    def label(self) -> str:
        """Return the name of the metric."""
        return self.name or own_code.split(self.function)[1]


def _item(model: type[NamedCall], written: str) -> BeforeValidator:
    """Return a validator that lets an item of a list also be a text alone."""

    def validate(value: Any) -> Any:
        if isinstance(value, model):
            return value
        given = {"function": value} if isinstance(value, str) else value
        if not isinstance(given, dict) or not {"function"} <= given.keys() <= {*model.model_fields}:
            raise ValueError(
                f"expected module:function, or {written}, got {value}; write one of these"
            )
        return given

    return BeforeValidator(validate)


CallItem = Annotated[NamedCall, _item(NamedCall, "{function: module:function, arguments: {...}}")]
MetricItem = Annotated[
    NamedMetric, _item(NamedMetric, "{function: module:function, arguments: {...}, name: ...}")
]
