"""Parse YAML text and `a.b=c` overrides into plain values, and note where each was written.

The text is walked as YAML nodes, because these have lines. Problems are collected in a `Draft`;
only text that is useless as a whole raises `YamlError`. `loader` reads the files.
"""

import re
from typing import Any, NamedTuple

import yaml

from gpipe_jax.config.base import Configuration
from gpipe_jax.config.messages import KeyPath, dotted, fields_of, show, unknown_key
from gpipe_jax.config.run import Config

_MOST_VALUES = 100_000  # YAML is slow: these take seconds
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

# Numbers that YAML 1.1 reads in another base than people, and YAML 1.2, do.
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")


class YamlError(Exception):
    """Report text that cannot be parsed, because of a mistake at `line`."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


class Location(NamedTuple):
    """Say where a value was written; locations sort as they are read: file, then overrides."""

    order: int
    label: str


class Draft:
    """Hold the plain values of a configuration, the place of each, and the problems so far."""

    def __init__(self, file: str, root: type[Configuration] = Config) -> None:
        self.file = file  # its path; empty if the values are not from a file
        self.root = root  # the class of the configuration
        self.values: dict[Any, Any] = {}
        self.places: dict[KeyPath, Location] = {(): self.line(1)}
        self.unreadable: set[KeyPath] = set()
        self.problems: list[tuple[Location, str]] = []

    def line(self, number: int) -> Location:
        """Return the place that is a line of the file."""
        return Location(number, f"{self.file}:{number}" if self.file else "")

    def find(self, path: KeyPath) -> Location:
        """Return the place of a value, or of the nearest thing around it that was written."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def report(self, place: Location, message: str) -> None:
        """Add a problem."""
        self.problems.append((place, message))

    def lines(self) -> list[str]:
        """Return the problems in the order of reading, each after its place."""
        ordered = sorted(self.problems, key=lambda problem: problem[0].order)
        return [f"{place.label}: {text}" if place.label else text for place, text in ordered]


def parse(draft: Draft, text: str) -> None:
    """Fill the draft with the values of a whole configuration."""
    node = _compose(text)
    if isinstance(node, yaml.MappingNode):
        draft.values = _build(draft, node, (), None) or {}
    elif node is not None:
        first, second, *_ = draft.root.model_fields
        message = f"expected sections such as '{first}:' and '{second}:', got {_noun(node)}"
        raise YamlError(node.start_mark.line + 1, message)


def override(draft: Draft, text: str, place: Location) -> None:
    """Set one value; an override that cannot be applied becomes a problem."""
    name, equals, value = text.removeprefix("--").partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not name.strip():
        draft.report(place, "expected section.field=value, such as mesh.stages=4")
    elif path[0] not in draft.root.model_fields:
        draft.report(place, unknown_key(path, draft.root))
    elif len(path) > 2:
        message = f"'{dotted(path[:2])}' is a value, not a section; give it as a whole"
        known = path[1] in fields_of(path[0], draft.root)
        draft.report(place, message if known else unknown_key(path[:2], draft.root))
    else:
        try:
            node = _compose(value)
        except YamlError as error:
            draft.report(place, f"{error}; try quotes around the value")
        else:
            _assign(draft, path, node, place)


def _assign(draft: Draft, path: KeyPath, node: yaml.Node | None, place: Location) -> None:
    section = draft.values
    if len(path) == 2:
        if section.get(path[0]) is None:
            section[path[0]] = {}
            draft.places.setdefault(path[:1], place)
        section = section[path[0]]
    if not isinstance(section, dict):
        message = f"'{dotted(path)}' cannot be set, because '{path[0]}' is {show(section)}"
        draft.report(place, f"{message} and not a mapping; make it one")
        return
    for old in [old for old in draft.places if old[: len(path)] == path]:
        del draft.places[old]
    draft.places[path] = place
    section[path[-1]] = None if node is None else _build(draft, node, path, place)


class _Composer(yaml.SafeLoader):
    """Build nodes only, and refuse what would loop or nest without end."""

    depth = 0
    count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise YamlError(
                line, f"aliases are not supported, got *{event.anchor}; write the value out"
            )
        if self.depth > _DEPTH:
            raise YamlError(line, f"nested more than {_DEPTH} levels deep, expected three")
        self.count += 1
        if self.count > _MOST_VALUES:
            raise YamlError(line, f"more than {_MOST_VALUES:,} values, expected a few hundred")
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
    raise YamlError(line, message)


def _build(draft: Draft, node: yaml.Node, path: KeyPath, place: Location | None) -> Any:
    """Return the plain value of a node; note the place of each part: `place`, or its own line."""
    own_place = place or draft.line(node.start_mark.line + 1)
    draft.places.setdefault(path, own_place)
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
            value = yaml.constructor.SafeConstructor().construct_object(node)
            reason = _misleading(node, value)
            if reason is None:
                return value
        except (ValueError, KeyError, IndexError):
            kind = node.tag.removeprefix(_TAG)
            reason = f"{show(node.value)} cannot be read as {kind}; correct it or quote it"
    draft.report(own_place, f"{dotted(path) or 'the file'}: {reason}")
    draft.unreadable.add(path)
    return None


def _misleading(node: yaml.Node, value: Any) -> str | None:
    """Return why a number is refused that YAML reads in base 8 or 60; None for all others."""
    given, kind = node.value, node.tag.removeprefix(_TAG)
    if kind in ("int", "float") and _BASE_60.fullmatch(given):
        return (
            f"YAML reads {given} in base 60, as {value}; write {value}, or quote it if it is text"
        )
    if kind == "int" and _OCTAL.fullmatch(given):
        meant = " or ".join(dict.fromkeys([str(value), str(int(given.replace("_", "")))]))
        return f"YAML reads {given} as octal, {value}; write {meant}, or quote it if it is text"
    return None


def _build_mapping(
    draft: Draft, node: yaml.MappingNode, path: KeyPath, place: Location | None
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        own_place = place or draft.line(line)
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != _TAG + "str":
            given = show(key) if isinstance(key, str) else _noun(key_node)
            draft.report(own_place, f"expected a name before the colon, got {given}; correct it")
        elif key in values:
            both = "" if place else f", on lines {lines[key]} and {line}"
            draft.report(own_place, f"'{dotted((*path, key))}' is given twice{both}; keep one")
        else:
            lines[key] = line
            draft.places[*path, key] = own_place
            values[key] = _build(draft, value_node, (*path, key), place)
    return values


def _noun(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "a single value"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
