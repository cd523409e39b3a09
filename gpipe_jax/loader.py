"""From YAML, dicts and `a.b=c` overrides to a `Config`, or to a list of everything that is wrong.

    load("configs/x.yaml", ["mesh.stages=4"])

A bad file costs one reading: every problem is reported at once, with the line (or the override)
that caused it. To know lines, the file is walked as YAML nodes; pydantic then finds the problems
of the values, and the place of each is looked up by its path.
"""

import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import yaml

from gpipe_jax.config import Config, section_models

_DEPTH = 20  # a configuration is three levels deep; much deeper would exhaust Python's stack
_TAG = "tag:yaml.org,2002:"
# Nothing here is a date, and outside keys `=` and `<<` mean nothing special: all these are text.
_TEXT = {_TAG + name for name in ("str", "timestamp", "value", "merge")}
_SCALARS = _TEXT | {_TAG + name for name in ("null", "bool", "int", "float")}
_TAGS = {
    yaml.ScalarNode: _SCALARS,
    yaml.SequenceNode: {_TAG + "seq"},
    yaml.MappingNode: {_TAG + "map"},
}
_AFTER_THE_FILE = 10**9  # more than any line number

_Path = tuple[Any, ...]


class ConfigError(ValueError):
    """The configuration cannot be used. `problems` holds one line for each reason."""

    def __init__(self, problems: Sequence[str], where: str) -> None:
        self.problems = tuple(problems)
        count = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
        super().__init__("\n".join([f"{count} in {where}:", *problems]))


class _NotYamlError(Exception):
    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class _Place(NamedTuple):
    """Where a value was written; places sort in the order of reading: file, then overrides."""

    order: int
    label: str


class _Draft:
    """Plain values of a configuration, the place of each, and the problems found so far."""

    def __init__(self, path: str) -> None:
        self.path = path  # of the file; empty if the values did not come from one
        self.values: dict[Any, Any] = {}
        self.places: dict[_Path, _Place] = {(): self.line(1)}
        self.unreadable: set[_Path] = set()
        self.problems: list[tuple[_Place, str]] = []

    def line(self, number: int) -> _Place:
        return _Place(number, f"{self.path}:{number}" if self.path else "")

    def find(self, path: _Path) -> _Place:
        """The place of a value, or of the nearest thing around it that was written at all."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def report(self, place: _Place, message: str) -> None:
        self.problems.append((place, message))

    def error(self) -> ConfigError:
        ordered = sorted(self.problems, key=lambda problem: problem[0].order)
        lines = [f"{place.label}: {text}" if place.label else text for place, text in ordered]
        return ConfigError(lines, self.path or "the configuration")


def load(
    source: str | os.PathLike[str] | Mapping[str, Any] | Config, overrides: Iterable[str] = ()
) -> Config:
    """The configuration in a YAML file (or given as values), after `section.field=value` overrides.

    Raises `ConfigError`, and nothing else, for bad input of any kind.
    """
    if isinstance(source, str | os.PathLike):
        draft = _read(Path(source))
    elif isinstance(source, Mapping | Config):
        draft = _Draft("")
        draft.values = {name: _copy(value) for name, value in dict(source).items()}
    else:
        message = f"expected a path, a dict or a Config, got {_show(source)}"
        raise ConfigError([message], "the configuration")
    for order, override in enumerate(overrides, _AFTER_THE_FILE):
        _override(draft, override, _Place(order, f"override {override!r}"))
    return _validate(draft)


def dump(config: Config) -> str:
    """The configuration as YAML, every default written out; loading it gives an equal `Config`."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def schema() -> dict[str, Any]:
    """The JSON schema of a configuration, for editors and other programs."""
    return Config.model_json_schema()


def differences(config: Config) -> dict[str, tuple[Any, Any]]:
    """What is not at its default: dotted name to (default, value).

    A section with kinds is compared with the defaults of the kind it has.
    """
    found = {}
    for name, section in config:
        defaults = dict(type(section)())
        if "kind" in defaults:
            usual = Config.model_fields[name].default
            defaults["kind"] = getattr(usual, "kind", section.kind)
        for field, value in section:
            if value != defaults[field]:
                found[f"{name}.{field}"] = (defaults[field], value)
    return found


def compare(there: Config, here: Config) -> list[str]:
    """One line for each setting in which two configurations differ; empty if they are equal."""
    left, right = (
        {f"{name}.{field}": value for name, section in config for field, value in section}
        for config in (there, here)
    )
    lines = []
    for name in left | right:
        a, b = (
            [_show(side[name]), side[name]] if name in side else ["absent"]
            for side in (left, right)
        )
        if a != b:
            lines.append(f"{name}: {a[0]} there, {b[0]} here")
    return lines


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, as people do."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)


def _copy(section: Any) -> Any:
    # Overrides write into sections, and must not write into the caller's.
    return dict(section) if isinstance(section, Mapping | pydantic.BaseModel) else section


# ---- text to plain values -----------------------------------------------------------------------


class _Composer(yaml.SafeLoader):
    """Only builds nodes, and refuses what would loop or nest without end."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise _NotYamlError(
                line, f"aliases are not supported, got *{event.anchor}; write the value out"
            )
        if self.depth > _DEPTH:
            raise _NotYamlError(line, f"nested more than {_DEPTH} levels deep, expected three")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _compose(text: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Composer)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"character {chr(int(error.character))!r} is not legal in YAML; remove it"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        message = f"not YAML: {', '.join(filter(None, [error.context, error.problem]))}"
    raise _NotYamlError(line, message)


def _read(path: Path) -> _Draft:
    draft = _Draft(str(path))
    try:
        node = _compose(_text(path))
    except _NotYamlError as error:
        draft.report(draft.line(error.line), str(error))
        raise draft.error() from None
    if isinstance(node, yaml.MappingNode):
        draft.values = _build(draft, node, (), None) or {}
    elif node is not None:
        message = f"expected sections such as 'model:' and 'data:', got {_noun(node)}"
        draft.report(draft.line(node.start_mark.line + 1), message)
        raise draft.error()
    return draft


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        try:
            neighbours = sorted(os.listdir(path.parent))
        except OSError:
            neighbours = []
        reason = f"no such file{_did_you_mean(path.name, neighbours)}"
    except IsADirectoryError:
        reason = "is a directory; give the path of a YAML file"
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 text, at byte {error.start}; save it as UTF-8"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise ConfigError([f"{path}: {reason}"], str(path))


def _build(draft: _Draft, node: yaml.Node, path: _Path, place: _Place | None) -> Any:
    """The plain value of a node; notes where each part was written (`place`, or its own line)."""
    here = place or draft.line(node.start_mark.line + 1)
    draft.places.setdefault(path, here)
    if node.tag not in _TAGS[type(node)]:
        tag = node.tag.replace(_TAG, "!!")
        reason = f"tag {tag} is not supported; remove it"
    elif isinstance(node, yaml.MappingNode):
        return _build_mapping(draft, node, path, place)
    elif isinstance(node, yaml.SequenceNode):
        items = enumerate(node.value)
        return [_build(draft, item, (*path, index), place) for index, item in items]
    elif node.tag in _TEXT:
        return node.value
    else:
        try:
            return yaml.constructor.SafeConstructor().construct_object(node)
        except (ValueError, KeyError, IndexError):
            kind = node.tag.removeprefix(_TAG)
            reason = f"{_show(node.value)} cannot be read as {kind}; correct it or quote it"
    draft.report(here, f"{_dotted(path) or 'the file'}: {reason}")
    draft.unreadable.add(path)
    return None


def _build_mapping(
    draft: _Draft, node: yaml.MappingNode, path: _Path, place: _Place | None
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        here = place or draft.line(line)
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            given = _show(key) if isinstance(key, str) else _noun(key_node)
            draft.report(here, f"expected a name before the colon, got {given}; correct it")
        elif key in values:
            both = "" if place else f", on lines {lines[key]} and {line}"
            draft.report(here, f"'{_dotted((*path, key))}' is given twice{both}; keep one")
        else:
            lines[key] = line
            draft.places[*path, key] = here
            values[key] = _build(draft, value_node, (*path, key), place)
    return values


def _noun(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "a single value"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _override(draft: _Draft, override: str, place: _Place) -> None:
    """Set one value; an override that cannot be applied becomes a problem."""
    name, equals, text = override.removeprefix("--").partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not name.strip():
        draft.report(place, "expected section.field=value, such as mesh.stages=4")
    elif path[0] not in Config.model_fields:
        draft.report(place, _unknown(path, ""))
    elif len(path) > 2:
        message = f"'{_dotted(path[:2])}' is a value, not a section; give it as a whole"
        draft.report(place, message if path[1] in _fields(path[0]) else _unknown(path[:2], ""))
    else:
        try:
            node = _compose(text)
        except _NotYamlError as error:
            draft.report(place, f"{error}; try quotes around the value")
        else:
            _assign(draft, path, node, place)


def _assign(draft: _Draft, path: _Path, node: yaml.Node | None, place: _Place) -> None:
    section = draft.values
    if len(path) == 2:
        if section.get(path[0]) is None:
            section[path[0]] = {}
        section = section[path[0]]
    if not isinstance(section, dict):
        message = f"'{_dotted(path)}' cannot be set, because '{path[0]}' is {_show(section)}"
        draft.report(place, f"{message} and not a mapping; make it one")
        return
    for old in [old for old in draft.places if old[: len(path)] == path]:
        del draft.places[old]
    draft.places[path] = place
    section[path[-1]] = None if node is None else _build(draft, node, path, place)


# ---- plain values to a Config -------------------------------------------------------------------


def _validate(draft: _Draft) -> Config:
    # `mesh:` with nothing below it is an empty section, which is to say the defaults.
    given = {
        name: value
        for name, value in draft.values.items()
        if value is not None or name not in Config.model_fields
    }
    try:
        config = Config.model_validate(given)
    except pydantic.ValidationError as error:
        for path, group in _by_path(error).items():
            if not any(path[:end] in draft.unreadable for end in range(len(path) + 1)):
                draft.report(draft.find(path), _describe(draft.values, path, group))
    else:
        if not draft.problems:
            return config
    raise draft.error()


def _by_path(error: pydantic.ValidationError) -> dict[_Path, list[Any]]:
    """Pydantic's errors by the path of the value in what was given.

    Pydantic's own path also names the kind of a section and the branch of a union. A value that may
    be a word or a list fails as each of them: if it fails inside the list, a list was meant.
    """
    groups: dict[_Path, list[Any]] = {}
    for item in error.errors(include_url=False):
        section, *rest = item["loc"]
        has_kinds = section in Config.model_fields and "" not in section_models(str(section))
        if has_kinds and item["type"] != "cross_check":
            rest = rest[1:]
        if item["type"] in ("missing", "union_tag_not_found", "union_tag_invalid"):
            rest = ["kind"]
        path = (section, *rest[:1], *(part for part in rest[1:] if isinstance(part, int)))
        groups.setdefault(path, []).append(item)
    with_items = {path[:2] for path in groups if len(path) > 2}
    return {path: group for path, group in groups.items() if path not in with_items}


def _describe(values: dict[Any, Any], path: _Path, errors: list[Any]) -> str:
    """One line for what is wrong with the value at `path`."""
    kind, given, name = errors[0]["type"], errors[0]["input"], _dotted(path)
    if kind in ("value_error", "cross_check"):
        return f"{name}: {errors[0]['ctx']['error']}"
    if kind == "extra_forbidden":
        has_kinds = path[0] in Config.model_fields and "" not in section_models(path[0])
        return _unknown(path, values[path[0]]["kind"] if has_kinds else "")
    if kind == "invalid_key":
        return f"{name}: expected a name as key, got {_show(path[-1])}; correct it"
    if kind in ("missing", "union_tag_not_found"):
        return f"{name}: required; give {_one_of(section_models(path[0]))}"
    if kind == "union_tag_invalid":
        given, legal = given["kind"], list(section_models(path[0]))
        rules = _one_of(legal)
    else:
        rules = " or ".join(dict.fromkeys(_rule(error) for error in errors))
        legal = re.findall(r"'(.*?)'", rules)
    hint = _did_you_mean(given, legal)
    if kind == "string_type" and isinstance(given, int | float):
        hint = "; put it in quotes"
    return f"{name}: expected {rules}, got {_show(given)}{hint}"


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


def _fields(section: str) -> list[str]:
    """The fields of a section, of any kind."""
    models = section_models(section).values()
    return list(dict.fromkeys(field for model in models for field in model.model_fields))


def _unknown(path: _Path, kind: str) -> str:
    """What to do about a key that does not exist, or not in this kind of section."""
    section, field = path[0], path[-1]
    message = f"unknown key '{_dotted(path)}'"
    if section in Config.model_fields:
        models = section_models(section)
        owners = [name for name, model in models.items() if field in model.model_fields]
        if owners:
            message = f"'{_dotted(path)}' belongs to {section}.kind {_one_of(owners)}, not {kind!r}"
            return (
                f"{message}; remove it, or override the whole section: '{section}={{kind: {kind}}}'"
            )
        near = list(models[kind].model_fields) if kind else _fields(section)
        legal = ", ".join(near)
        near = {f"{section}.{name}": name for name in near}
    else:
        near = {name: name for name in Config.model_fields}
        legal = ", ".join(near)
    everywhere = {f"{name}.{leaf}": leaf for name in Config.model_fields for leaf in _fields(name)}
    for names in (near, everywhere):
        for name, leaf in names.items():
            if leaf in difflib.get_close_matches(str(field)[:80], names.values(), n=1):
                return f"{message}; did you mean '{name}'?"
    return f"{message}; legal keys: {legal}"


def _one_of(names: Iterable[str]) -> str:
    *most, last = map(repr, names)
    return f"{', '.join(most)} or {last}" if most else last


def _did_you_mean(given: Any, legal: Sequence[str]) -> str:
    # Cut, because the comparison takes quadratic time.
    close = difflib.get_close_matches(given[:80], legal, n=1) if isinstance(given, str) else []
    return f"; did you mean {close[0]!r}?" if close else ""


def _dotted(path: _Path) -> str:
    """A path as people write it, on one line: `model.widths[1]`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    name = "".join(parts).removeprefix(".")
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= 120 else f"{name[:100]}..."


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxtuple = _SHORT.maxlist = 32


def _show(value: Any) -> str:
    """A value on one line, not too long."""
    if value is None:
        return "nothing"
    try:
        return _SHORT.repr(list(value) if isinstance(value, tuple) else value)
    except ValueError:  # Python does not print integers of thousands of digits
        return "a huge number"
