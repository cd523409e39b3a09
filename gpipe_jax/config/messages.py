"""Word the loader's messages: what was expected, what was given, and what to do.

A message fits on one line, whatever was given: values and paths are escaped and cut.
"""

import reprlib
from collections.abc import Iterable, KeysView, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from gpipe_jax.config.base import Configuration, Section
from gpipe_jax.config.run import Config, section_models
from gpipe_jax.utils import text

KeyPath = tuple[Any, ...]  # from the root of the configuration to a value


# --- one field ------------------------------------------------------------------------------------


def describe(path: KeyPath, errors: Sequence[Any], field: FieldInfo | None) -> str:
    """Word pydantic's errors of one value; several are branches of a union that all failed.

    Args:
        path: Where the value is.
        errors: The errors, as `pydantic.ValidationError.errors` gives them.
        field: The field, for its description and its legal words.
    """
    kind, given, name = errors[0]["type"], errors[0]["input"], dotted(path)
    if kind in ("value_error", "cross_check"):
        return problem_of(name, errors[0]["ctx"]["error"])
    if kind == "invalid_key":
        return not_a_name(path)
    if kind == "missing":
        return f"{name}: required; give {field.description if field else None}"
    rules = " or ".join(dict.fromkeys(_rule(error) for error in errors))
    hint = text.did_you_mean(given, _words(field.annotation) if field else [])
    if kind == "string_type" and isinstance(given, int | float):
        hint = "; put it in quotes"
    return f"{name}: expected {rules}, got {show(given)}{hint}"


def problem_of(name: str, problem: object) -> str:
    """Word a problem of a rule, cut if it is long: it may quote a value of any length."""
    words = str(problem)
    return f"{name}: {words if len(words) <= _LONGEST else f'{words[:_LONGEST]}...'}"


def _words(annotation: Any) -> list[str]:
    """Return the words that a type allows, in it or in the items of a list."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [word for word in arguments if isinstance(word, str)]
    return [word for argument in arguments for word in _words(argument)]


_LONGEST = 1000  # characters of a problem

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
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "too_short": "a list of at least {min_length}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
}


def _rule(error: Any) -> str:
    """Return the rule of pydantic as text that follows "expected"."""
    words = {name: str(value).removesuffix(".0") for name, value in error.get("ctx", {}).items()}
    rule = _RULES.get(error["type"])
    return rule.format_map(words) if rule else error["msg"]


# --- sections and keys ----------------------------------------------------------------------------


SECTIONS = {
    "gpipe train": ("model", "data", "loss", "mesh", "pipeline", "optimizer", "train", "profile"),
    "nas search": ("space", "evaluate", "evolution", "limits", "run"),
}


def other_command(sections: KeysView[Any], root: type[Configuration]) -> str | None:
    """Word the problem of a whole file that is for another command; return None if it is not."""
    own = len(sections & root.model_fields.keys())
    for command, names in SECTIONS.items():
        if len(sections & set(names)) > own:
            return f"this is a config of `{command}`; give it to that command, or give another file"
    return None


def not_a_section(name: str, given: Any) -> str:
    """Word the problem of a section that is not a mapping."""
    return f"{name}: expected a mapping (lines of 'key: value'), got {show(given)}"


def not_a_name(path: KeyPath) -> str:
    """Word the problem of a key that is not a text."""
    return f"{dotted(path)}: expected a name as key, got {show(path[-1])}; correct it"


def no_kind(name: str, kinds: Sequence[str]) -> str:
    """Word the problem of a section that does not say its kind."""
    return f"{name}.kind: required; give {_one_of(kinds)}"


def unknown_kind(name: str, given: Any, kinds: Sequence[str], root: type[Configuration]) -> str:
    """Word the problem of a section whose kind does not exist."""
    if reason := root.refused.get(f"{name}.kind={given}"):
        return f"{name}.kind: {reason}"
    hint = text.did_you_mean(given, kinds)
    return f"{name}.kind: expected {_one_of(kinds)}, got {show(given)}{hint}"


def fields_of(section: str, root: type[Configuration] = Config) -> list[str]:
    """Return the fields of a section, of all its kinds."""
    models = section_models(section, root).values()
    return list(dict.fromkeys(field for model in models for field in model.model_fields))


def unknown_key(
    path: KeyPath,
    root: type[Configuration] = Config,
    kind: str = "",
    *,
    kind_is_overridden: bool = False,
) -> str:
    """Word the problem of a key that does not exist, or not in this kind of section.

    Args:
        path: Where the key is.
        root: The whole configuration.
        kind: The kind of the section, if it has kinds and the kind is known.
        kind_is_overridden: Whether an override gave the kind, and the file has keys of another.
    """
    section, field = path[0], path[-1]
    if dotted(path) in root.renamed:
        return f"'{dotted(path)}' is now '{root.renamed[dotted(path)]}'; rename it"
    if section not in root.model_fields:
        return f"unknown key '{dotted(path)}'" + _suggestion(field, "", [*root.model_fields], root)
    models = section_models(section, root)
    owners = [name for name, model in models.items() if field in model.model_fields]
    if owners and kind:
        message = f"'{dotted(path)}' belongs to {section}.kind {_one_of(owners)}, not {kind!r}"
        whole = f", or override the whole section: '{section}={{kind: {kind}}}'"
        return f"{message}; remove it{whole if kind_is_overridden else ''}"
    siblings = list(models[kind].model_fields) if kind else fields_of(section, root)
    return f"unknown key '{dotted(path)}'" + _suggestion(field, f"{section}.", siblings, root)


def item_section(model: type[Section], path: KeyPath) -> type[Section] | None:
    """Return the section of the items of a list, if `path` is a key in an item; else None."""
    if len(path) != 4:  # section, field, index, key
        return None
    annotation = model.model_fields[path[1]].annotation
    found = [a for a in get_args(annotation) if isinstance(a, type) and issubclass(a, Section)]
    return found[0] if found else None


def unknown_key_of_item(path: KeyPath, item: type[Section]) -> str:
    """Word the problem of a key that an item of a list does not have."""
    legal = list(item.model_fields)
    hint = text.did_you_mean(path[-1], legal) or f"; legal keys: {', '.join(legal)}"
    return f"unknown key '{dotted(path)}'{hint}"


def _suggestion(field: Any, prefix: str, siblings: Sequence[str], root: type[Configuration]) -> str:
    """Suggest a similar name: first of the siblings, then of the fields of all sections."""
    everywhere = {
        f"{section}.{name}": name
        for section in root.model_fields
        for name in fields_of(section, root)
    }
    for names in ({f"{prefix}{name}": name for name in siblings}, everywhere):
        nearest = text.nearest_name(str(field), names.values())
        for dotted_name, name in names.items():
            if name == nearest:
                return f"; did you mean '{dotted_name}'?"
    return f"; legal keys: {', '.join(siblings)}"


def _one_of(names: Iterable[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


# --- paths and values -----------------------------------------------------------------------------


def dotted(path: KeyPath) -> str:
    """Write a path as people do, on one line: `model.widths[1]`."""
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in path]
    name = "".join(steps).removeprefix(".")
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= 120 else f"{name[:100]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxtuple = _SHORT.maxlist = 32


def show(value: Any) -> str:
    """Write a value on one line, cut if it is long."""
    if value is None:
        return "nothing"
    try:
        return _SHORT.repr(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a huge number"
