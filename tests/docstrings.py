"""Read the docstrings of public names: those of `__all__`, of its modules and of its classes."""

import inspect
import re
import textwrap
import types
from collections.abc import Iterator


def public_objects(package: types.ModuleType) -> dict[str, object]:
    """Return classes, functions and public methods by dotted name, as "zoo.Genotype.plot".

    A method that overrides another one, or that implements one of a public protocol, is left out:
    it is described where it is defined.
    """
    objects = dict(_walk(package, package.__all__, ""))
    protocols = [name for name, value in objects.items() if _is_protocol(value)]
    promised = {name.rpartition(".")[2] for name in objects if name.rpartition(".")[0] in protocols}

    def implements(name: str) -> bool:
        owner, _, method = name.rpartition(".")
        return method in promised and inspect.isclass(objects.get(owner)) and owner not in protocols

    return {name: value for name, value in objects.items() if not implements(name)}


def _is_protocol(value: object) -> bool:
    return inspect.isclass(value) and getattr(value, "_is_protocol", False)


def _walk(owner: object, names: list[str], prefix: str) -> Iterator[tuple[str, object]]:
    for name in names:
        value, dotted = getattr(owner, name), f"{prefix}{name}"
        if inspect.ismethod(value):  # of the class
            value = value.__func__
        if inspect.ismodule(value):
            yield from _walk(value, _public_names(value), f"{dotted}.")
        elif inspect.isclass(value):
            yield dotted, value
            yield from _walk(value, _own_members(value), f"{dotted}.")
        elif inspect.isfunction(value):
            yield dotted, value


def _public_names(module: types.ModuleType) -> list[str]:
    """Return `__all__` of a module, or else the public names that it defines."""
    own = [
        name
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    ]
    return getattr(module, "__all__", own)


def _own_members(kind: type) -> list[str]:
    """Return the public members of a class; what overrides is described where it is defined."""
    inherited = {name for base in kind.__mro__[1:] for name in vars(base)}
    return [name for name in vars(kind) if name[0] != "_" and name not in inherited]


def undocumented(value: object) -> list[str]:
    """Return the parameters that no section describes, and "Returns" if it is missing.

    A summary that begins with "Return" or "Yield" describes the result.
    """
    assert callable(value)
    documentation = inspect.getdoc(value) or ""
    if inspect.isclass(value) and (issubclass(value, BaseException) or _is_protocol(value)):
        parameters = []  # an exception is caught and a protocol implemented: nobody calls them
    else:
        parameters = [
            name for name in inspect.signature(value).parameters if name not in ("self", "cls")
        ]
    missing = [
        name
        for name in parameters
        if not re.search(rf"^ +\*{{0,2}}{name}( \(.*\))?:", documentation, re.MULTILINE)
    ]
    if inspect.isfunction(value) and value.__annotations__.get("return") not in (None, "None"):
        described = re.search(r"^(Returns|Yields):|\A(Return|Yield) ", documentation, re.MULTILINE)
        missing += [] if described else ["Returns"]
    return missing


def examples(package: types.ModuleType) -> dict[str, str]:
    """Return the code of each `Example::` block by dotted name."""
    blocks = {}
    for name, value in public_objects(package).items():
        documentation = inspect.getdoc(value) or ""
        block = re.search(r"^Example::\n\n((?: {4}.*\n?|\n)+)", documentation, re.MULTILINE)
        if block:
            blocks[name] = textwrap.dedent(block[1]).rstrip() + "\n"
    return blocks
