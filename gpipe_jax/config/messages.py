"""The words of the loader's messages: what was expected, what was given, and what to do.

A message fits on one line, whatever was given: values and paths are shown escaped and cut.
"""

import re
import reprlib
from collections.abc import Iterable
from typing import Any

from gpipe_jax.config import Section
from gpipe_jax.config.run import Config, section_models
from gpipe_jax.utils import text

KeyPath = tuple[Any, ...]  # from the root of the configuration to a value


def describe(
    values: dict[Any, Any], path: KeyPath, errors: list[Any], root: type[Section] = Config
) -> str:
    """One line for what is wrong with the value at `path`."""
    kind, given, name = errors[0]["type"], errors[0]["input"], dotted(path)
    if kind in ("value_error", "cross_check"):
        return f"{name}: {errors[0]['ctx']['error']}"
    if kind == "extra_forbidden":
        has_kinds = path[0] in root.model_fields and "" not in section_models(path[0], root)
        return unknown_key(path, values[path[0]]["kind"] if has_kinds else "", root)
    if kind == "invalid_key":
        return f"{name}: expected a name as key, got {show(path[-1])}; correct it"
    if kind == "missing" and path[1] != "kind":
        model = section_models(path[0], root)[values[path[0]].get("kind", "")]
        return f"{name}: required; give {model.model_fields[path[1]].description}"
    if kind in ("missing", "union_tag_not_found"):
        return f"{name}: required; give {_one_of(section_models(path[0], root))}"
    if kind == "union_tag_invalid":
        given, legal = given["kind"], list(section_models(path[0], root))
        rules = _one_of(legal)
    else:
        rules = " or ".join(dict.fromkeys(_rule(error) for error in errors))
        legal = re.findall(r"'(.*?)'", rules)
    hint = text.did_you_mean(given, legal)
    if kind == "string_type" and isinstance(given, int | float):
        hint = "; put it in quotes"
    return f"{name}: expected {rules}, got {show(given)}{hint}"


_RULES = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "string_too_short": "text, not nothing",
    "tuple_type": "a list",
    "too_short": "a list of at least {min_length}",
    "model_type": "a mapping (lines of 'key: value')",
    "model_attributes_type": "a mapping (lines of 'key: value')",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}


def _rule(error: Any) -> str:
    """What pydantic wanted, in words that follow `expected`."""
    words = {name: str(value).removesuffix(".0") for name, value in error.get("ctx", {}).items()}
    rule = _RULES.get(error["type"])
    return rule.format_map(words) if rule else error["msg"]


def fields_of(section: str, root: type[Section] = Config) -> list[str]:
    """The fields of a section, of any kind."""
    models = section_models(section, root).values()
    return list(dict.fromkeys(field for model in models for field in model.model_fields))


def unknown_key(path: KeyPath, kind: str, root: type[Section] = Config) -> str:
    """What to do about a key that does not exist, or not in this kind of section."""
    section, field = path[0], path[-1]
    message = f"unknown key '{dotted(path)}'"
    if section in root.model_fields:
        models = section_models(section, root)
        owners = [name for name, model in models.items() if field in model.model_fields]
        if owners:
            message = f"'{dotted(path)}' belongs to {section}.kind {_one_of(owners)}, not {kind!r}"
            return (
                f"{message}; remove it, or override the whole section: '{section}={{kind: {kind}}}'"
            )
        near = list(models[kind].model_fields) if kind else fields_of(section, root)
        legal = ", ".join(near)
        near = {f"{section}.{name}": name for name in near}
    else:
        near = {name: name for name in root.model_fields}
        legal = ", ".join(near)
    everywhere = {
        f"{name}.{leaf}": leaf for name in root.model_fields for leaf in fields_of(name, root)
    }
    for names in (near, everywhere):
        meant = text.nearest_name(str(field), names.values())
        for name, leaf in names.items():
            if leaf == meant:
                return f"{message}; did you mean '{name}'?"
    return f"{message}; legal keys: {legal}"


def _one_of(names: Iterable[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


def dotted(path: KeyPath) -> str:
    """A path as people write it, on one line: `model.widths[1]`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    name = "".join(parts).removeprefix(".")
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= 120 else f"{name[:100]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxtuple = _SHORT.maxlist = 32


def show(value: Any) -> str:
    """A value on one line, not too long."""
    if value is None:
        return "nothing"
    try:
        return _SHORT.repr(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a huge number"
