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


@pytest.mark.parametrize("error", [OSError("no route"), errors.ConfigError(["a"], "x.yaml")])
def test_errors_that_are_no_mistake_of_an_option_pass(error):
    """Let the network fail once; a ConfigError names its own place."""
    with pytest.raises(type(error)) as caught, console.option("--process"):
        raise error
    assert caught.value is error


def test_errors_are_the_only_contents():
    module = errors.__name__
    own = {v.__name__ for v in vars(errors).values() if getattr(v, "__module__", "") == module}
    assert own == {error.__name__ for error in ALL}
