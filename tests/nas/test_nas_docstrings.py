"""Check that the public names of `nas` document each argument, and its default."""

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import nas

# Methods that implement those of these classes have the same arguments.
INTERFACES = (nas.Space, nas.DrawableSpace, nas.Evaluator)
INTERFACE_METHODS = {name for each in INTERFACES for name in vars(each) if name[0] != "_"}


def documented() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield public functions, classes with arguments, and methods."""
    for name in nas.__all__:
        value = getattr(nas, name)
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            if value not in INTERFACES and not issubclass(value, BaseException):
                yield name, value
            for member, method in vars(value).items():
                own = value in INTERFACES or member not in INTERFACE_METHODS
                if inspect.isfunction(method) and member[0] != "_" and own:
                    yield f"{name}.{member}", method


@pytest.mark.parametrize(("name", "value"), list(documented()))
def test_arguments_and_defaults_are_documented(name: str, value: Callable[..., Any]) -> None:
    text = inspect.cleandoc(value.__doc__ or "")
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name == "self":
            continue
        entry = re.search(rf"^ +\**{parameter.name}: .*(\n {{8}}.*)*", text, re.MULTILINE)
        assert entry, f"{name}: {parameter}"
        if parameter.default is not parameter.empty:
            assert "efault" in entry[0], f"{name}: {parameter}"
