"""Define what all sections of a configuration share: types, marks, base classes, errors."""

import contextlib
import enum
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic import ValidationError as PydanticError
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from gpipe_jax.errors import ArgumentError, SectionError
from gpipe_jax.utils import paths

LARGEST = 2**31 - 1  # JAX holds shapes and steps in 32 bits


def _not_a_bool(error_type: Any) -> BeforeValidator:
    # Python counts True as 1, and YAML reads an unquoted `yes` as True. Neither is a number.
    def validate(value: Any) -> Any:
        if isinstance(value, bool):
            raise PydanticKnownError(error_type)
        return value

    return BeforeValidator(validate)


# A field bounds a count further with `lt`: pydantic would let the `le` here win over another one.
Count = Annotated[int, Field(ge=1, le=LARGEST), _not_a_bool("int_type")]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST), _not_a_bool("int_type")]
# A count of objects in memory, such as layers.
Depth = Annotated[int, Field(ge=1, le=100_000), _not_a_bool("int_type")]
Positive = Annotated[float, Field(gt=0), _not_a_bool("float_type")]
PositiveOrZero = Annotated[float, Field(ge=0), _not_a_bool("float_type")]
Fraction = Annotated[float, Field(ge=0, lt=1), _not_a_bool("float_type")]
Text = Annotated[str, Field(min_length=1)]


def _as_text(value: Any) -> Any:
    is_layer = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_layer else value


# A pattern of parameters; a whole number is the index of a layer.
Pattern = Annotated[Text, BeforeValidator(_as_text)]


def _path(*, bucket: bool) -> AfterValidator:
    # `~` and variables stay as written: they are replaced where the path is used.
    def validate(path: str) -> str:
        problem = paths.path_problem(path, bucket=bucket)
        if problem is not None:
            raise ValueError(f"got {path!r}, but {problem}")
        return path

    return AfterValidator(validate)


LocalPath = Annotated[Text, _path(bucket=False)]  # see `utils.paths`
AnyPath = Annotated[Text, _path(bucket=True)]  # or a gs:// address


class Mark(enum.Enum):
    """Say what a setting does not change; write it into the type: `Annotated[Count, Mark.LAYOUT]`.

    A setting without a mark may change everything. It must stay the same when a run resumes, and
    when a run follows a plan.
    """

    LAYOUT = "chosen by a plan; changes time and memory, but no result"
    OPERATION = "changes no result: how the work is done, and what is written about it"
    LENGTH = "changes the result, but neither time nor memory of a step"


class NamedCode(NamedTuple):
    """Hold a reference to code, its arguments, and the field that has it."""

    field: str
    reference: str
    arguments: Mapping[str, Any]


class Section(BaseModel):
    """Define what all sections have: immutable, no unknown keys, only finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )

    def unused(self) -> dict[str, str]:
        """Return the fields without effect: {field: the setting of this section that is why}.

        They are legal: one override of a file may leave others of its settings without effect.
        """
        return {}

    def named_code(self) -> list[NamedCode]:
        """Return the functions that the section names."""
        return []

    @classmethod
    def mark(cls, field: str) -> Mark | None:
        """Return the mark of a field, if it has one."""
        metadata = cls.model_fields[field].metadata
        return next((entry for entry in metadata if isinstance(entry, Mark)), None)

    @model_validator(mode="before")
    @classmethod
    def _without_numpy(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    """Return numbers and arrays of NumPy as Python's, also inside a list."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


Problems = list[tuple[str, str]]  # (dotted name, message) of each


class Configuration(Section):
    """Define what a whole configuration has: its fields are sections.

    Class attributes:
        rules: Rules between sections. The parameters of a rule are named after the sections that
            it needs. It returns the problems; each is reported at the setting that it names.
        renamed: New dotted names of settings by their old ones. An old name is an error that says
            the new one.
        refused: Values that are no kinds, as "section.kind=value", and what to use for them.
    """

    rules: ClassVar[tuple[Callable[..., Problems], ...]] = ()
    renamed: ClassVar[Mapping[str, str]] = {}
    refused: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def cross_check(cls, sections: Mapping[str, Any], partial: Collection[str] = ()) -> Problems:
        """Return every rule that is broken, among those whose sections are all there.

        Args:
            sections: The sections by name.
            partial: The sections without their invalid settings. A rule that reads one of these
                settings is left out.
        """
        problems: Problems = []
        for rule in cls.rules:
            names = inspect.signature(rule).parameters
            if not sections.keys() >= names.keys():
                continue
            lacking = (AttributeError,) if names.keys() & set(partial) else ()
            with contextlib.suppress(*lacking):
                problems += rule(*(sections[name] for name in names))
        return problems

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        # One error each, with its own location, where a plain ValueError would give one for all.
        problems = [cross_check(name, message) for name, message in self.cross_check(dict(self))]
        if problems:
            raise PydanticError.from_exception_data(type(self).__name__, problems)
        return self


def cross_check(name: str, message: str) -> InitErrorDetails:
    """Return a problem between sections as an error of pydantic, located at a dotted name."""
    error = PydanticCustomError("cross_check", "{error}", {"error": message})
    return InitErrorDetails(type=error, loc=tuple(name.split(".")), input=None)


# What is raised for sizes, shapes, files, devices and packages that do not fit.
_REALIZATION_ERRORS = (ValueError, OSError, ImportError)


@contextlib.contextmanager
def section(
    name: str,
    also: tuple[type[Exception], ...] = (),
    /,
    *,
    file_field: str | None = None,
    **fields: str,
) -> Iterator[None]:
    """Turn errors of the block into a `SectionError` of the section `name`.

    Args:
        name: The section whose values the block uses.
        also: Further types of errors to turn, besides ValueError, OSError and ImportError.
        file_field: The field that an OSError is about, such as the path of the data.
        **fields: The config's name of an argument, where it is another:
            `memory_limit="memory_limit_gib"`; with a dot, it is one of another section:
            `frozen="model.frozen"`.

    Returns:
        A context manager.

    Raises:
        SectionError: The block raised one of these errors.
    """
    try:
        yield
    except SectionError:
        raise
    except (*_REALIZATION_ERRORS, *also) as error:
        field = file_field if isinstance(error, OSError) else None
        if isinstance(error, ArgumentError):
            field = fields.get(error.argument, error.argument)
            other, dot, setting = field.partition(".")
            name, field = (other, setting) if dot else (name, field)
        raise SectionError(name, field, str(error)) from error
