"""Test the exceptions: what they hold, how they are translated, and that they can be sent."""

import pickle

import pytest

from gpipe_jax import errors
from gpipe_jax.utils import console

ALL = [error for error in vars(errors).values() if isinstance(error, type)]
ALL = [error for error in ALL if issubclass(error, Exception)]


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_exception_is_in_the_table(error):
    assert error.__doc__.startswith("Report ")
    assert f"    {error.__name__} " in errors.__doc__


@pytest.mark.parametrize(
    "error",
    [
        errors.ArgumentError("image", "`image` is 8"),
        errors.ConfigError(["a: 1", "b: 2"], "x.yaml"),
        errors.SectionError("model", "image", "it is 8"),
        errors.OptionError("--topology", "unknown"),
        errors.DataError("no labels"),
    ],
)
def test_exceptions_can_be_pickled(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error) and vars(copy) == vars(error)


def test_a_config_error_counts_its_problems():
    assert str(errors.ConfigError(["a"], "x.yaml")) == "1 problem in x.yaml:\na"
    assert str(errors.ConfigError(["a", "b"], "x.yaml")) == "2 problems in x.yaml:\na\nb"


@pytest.mark.parametrize(
    ("error", "field"),
    [
        (errors.ArgumentError("image", "`image` is 8"), "image"),
        (errors.ArgumentError("memory_limit", "too low"), "memory_limit_gib"),
        (ValueError("it does not fit"), None),
        (FileNotFoundError("it is missing"), "train"),
        (ImportError("no module"), None),
        (TypeError("no function"), None),
    ],
)
def test_a_section_names_the_field_of_an_argument(error, field):
    with (
        pytest.raises(errors.SectionError) as caught,
        errors.section("data", (TypeError,), file_field="train", memory_limit="memory_limit_gib"),
    ):
        raise error
    assert (caught.value.section, caught.value.field) == ("data", field)
    assert str(caught.value) == f"data: {error}" and caught.value.__cause__ is error


def test_a_section_lets_other_errors_pass():
    inner = errors.SectionError("model", None, "wrong")
    for error in (KeyError("x"), inner):
        with pytest.raises(type(error)) as caught, errors.section("data"):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("unknown"), "--topology: unknown"),
        (errors.ArgumentError("slices", "too few"), "--slices: too few"),
        (errors.ArgumentError("name", "unknown"), "--topology: unknown"),
    ],
)
def test_an_option_is_named(error, message):
    with (
        pytest.raises(errors.OptionError) as caught,
        console.option("--topology", slices="--slices"),
    ):
        raise error
    assert str(caught.value) == message
