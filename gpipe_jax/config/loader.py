"""Load a `Config` from YAML, dicts and `a.b=c` overrides, or list everything that is wrong.

    load("configs/x.yaml", ["mesh.stages=4"])

    file, overrides --yaml_parser--> Draft: values, and the place of each
    each section    --pydantic-----> sections that are valid
    valid settings  --rules--------> Config

All problems are reported at once, each with its line or its override: those of every section, and
those between settings that are valid. `messages` words them.
"""

import contextlib
import os
import stat
import types
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import pydantic
import yaml
from etils import epath
from pydantic_core import to_jsonable_python

from gpipe_jax.config import messages
from gpipe_jax.config.base import Configuration, Section
from gpipe_jax.config.messages import KeyPath, show
from gpipe_jax.config.run import Config, calls, section_models, unused
from gpipe_jax.config.yaml_parser import Draft, Location, YamlError, override, parse
from gpipe_jax.errors import ArgumentError, ConfigError, SectionError
from gpipe_jax.utils import paths
from gpipe_jax.utils.text import did_you_mean, install_advice

Source = str | os.PathLike[str] | Mapping[str, Any] | Section
C = TypeVar("C", bound=Configuration)

_AFTER_THE_FILE = 10**9  # more than any line number
_LARGEST_FILE = 1_000_000  # bytes; a configuration has a few thousand, and YAML is slow


def load(source: Source, overrides: Iterable[str] = ()) -> Config:
    """Load the configuration of a run; `Trainer.load` loads checkpoints.

    Args:
        source: The path of a YAML file (also gs://), a dict of sections, or a `Config`.
        overrides: Settings that replace the source's, such as "mesh.stages=4" or
            "optimizer={kind: sgd}"; later ones win. Default: none.

    Returns:
        The configuration, every default filled in. It is immutable.

    Raises:
        ConfigError: The source or an override is invalid. It lists every problem with its line (or
            override), the rule and a remedy. No other exception leaves `load` for bad input.

    Example::

        config = gpipe.load("configs/digits.yaml", ["train.steps=100"])
    """
    config = load_as(Config, source, overrides)
    if config.train.code is None and calls(config) and isinstance(source, str | os.PathLike):
        folder = os.path.dirname(source)
        if folder and paths.is_local(folder):
            train = config.train.model_copy(update={"code": folder})
            return config.model_copy(update={"train": train})
    return config


def load_as(root: type[C], source: Source, overrides: Iterable[str] = ()) -> C:
    """Load another kind of configuration: a subclass of `Configuration`; see `load`."""
    draft = _draft(source, overrides, root)
    if other := messages.other_command(draft.values.keys(), root):
        draft.problems = []  # the rest follows from this one
        _report(draft, (), other)
        raise _error(draft)
    checked = {name: _section(draft, name) for name in root.model_fields}
    unknown = draft.values.keys() - root.model_fields.keys()
    for name in unknown:
        word = messages.unknown_key((name,), root) if isinstance(name, str) else None
        _report(draft, (name,), word or messages.not_a_name((name,)))
    if unknown:  # one of them may stand for a section left out
        checked = {name: found for name, found in checked.items() if name in draft.values}
    sections = {name: section for name, (section, _) in checked.items() if section is not None}
    partial = [name for name, (_, is_valid) in checked.items() if not is_valid]
    for name, problem in root.cross_check(sections, partial):
        _report(draft, tuple(name.split(".")), messages.problem_of(name, problem))
    if draft.problems:
        raise _error(draft)
    try:
        return root.model_validate(sections)
    except pydantic.ValidationError as error:  # a validator of the root itself
        for path, group in _by_path((), error).items():
            _report(draft, path, messages.describe(path, group, None))
        raise _error(draft) from None


@contextlib.contextmanager
def locating(
    source: Source, overrides: Iterable[str], root: type[Configuration] = Config
) -> Iterator[None]:
    """Turn a `SectionError` of the block into a `ConfigError` with the line of the setting.

    Args:
        source: Where the configuration was loaded from.
        overrides: The overrides that it was loaded with.
        root: The kind of configuration.
    """
    try:
        yield
    except SectionError as error:
        draft = _draft(source, overrides, root)
        path = (error.section,) if error.field is None else (error.section, error.field)
        draft.report(draft.find(path), str(error))
        raise _error(draft) from error


def dump(config: Section) -> str:
    """Write a configuration as YAML, with every default; loading it gives an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration, for editors and other programs."""
    return Config.model_json_schema()


# --- differences ----------------------------------------------------------------------------------


class _Absent:
    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()  # in place of the value of a setting that one of two configurations lacks

Differences = dict[str, tuple[Any, Any]]  # dotted name: (before, now)


def non_defaults(config: Config) -> Differences:
    """Return the settings that are not at their default: {dotted name: (default, value)}.

    A section with kinds is compared with the defaults of its kind.
    """
    changed = {}
    for name, section in config:
        defaults = dict(type(section).model_construct())  # without those that are required
        if "kind" in defaults:
            usual = Config.model_fields[name].default
            defaults["kind"] = getattr(usual, "kind", section.kind)
        for field, value in section:
            default = defaults.get(field)
            if value != default:
                changed[f"{name}.{field}"] = (default, value)
    return changed


def without_effect(config: Config) -> list[str]:
    """Return one line for each setting that is not at its default, and has no effect."""
    changed, reasons = non_defaults(config), unused(config)
    return [f"{name} has no effect with {reasons[name]}" for name in reasons if name in changed]


def compare(before: Config, now: Config) -> Differences:
    """Return the settings that differ: {dotted name: (before, now)}; ABSENT if one has none.

    Settings without effect in both configurations are left out.
    """
    left, right = (
        {f"{name}.{field}": value for name, section in config for field, value in section}
        for config in (before, now)
    )
    ignored = unused(before).keys() & unused(now).keys()
    pairs = {name: (left.get(name, ABSENT), right.get(name, ABSENT)) for name in left | right}
    return {name: (a, b) for name, (a, b) in pairs.items() if a != b and name not in ignored}


def describe_differences(differences: Differences) -> list[str]:
    """Write one line for each difference."""
    plain = {
        name: [a if a is ABSENT else to_jsonable_python(a, exclude_none=True) for a in pair]
        for name, pair in differences.items()
    }
    return [f"{name}: {show(a)} before, {show(b)} now" for name, (a, b) in plain.items()]


class _Dumper(yaml.SafeDumper):
    """Write lists on one line, as people do."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)


# --- reading --------------------------------------------------------------------------------------


def _draft(source: Source, overrides: Iterable[str], root: type[Configuration]) -> Draft:
    if isinstance(source, str | os.PathLike):
        draft = _read(source, root)
    elif isinstance(source, Mapping | Section):
        draft = Draft("", root)
        draft.values = {name: _copy(value) for name, value in dict(source).items()}
    else:
        message = f"expected a path, a dict or a Config, got {show(source)}"
        raise ConfigError([message], "the configuration")
    for order, text in enumerate(overrides, _AFTER_THE_FILE):
        override(draft, text, Location(order, f"override {text!r}"))
    return draft


def _copy(section: Any) -> Any:
    # Overrides write into sections, and must not write into the caller's.
    return dict(section) if isinstance(section, Mapping | pydantic.BaseModel) else section


def _read(source: str | os.PathLike[str], root: type[Configuration]) -> Draft:
    try:
        path = paths.anywhere("config", source)
    except ArgumentError as error:
        raise ConfigError([str(error)], os.fspath(source)) from error
    draft = Draft(str(path), root)
    try:
        parse(draft, _text(path))
    except YamlError as error:
        draft.report(draft.line(error.line), str(error))
        raise _error(draft) from None
    return draft


def no_package(error: ImportError) -> str:
    """Word the problem that an address needs a package which is missing."""
    return f"{error}; for gs:// {install_advice('tpu')}, or pip install 'etils[epath-gcs]'"


def no_run(path: str | os.PathLike[str]) -> str:
    """Word the problem that there is nothing where a run should be."""
    return f"{path}: no such file or folder; give the folder of a run"


def _text(path: epath.Path) -> str:
    line = ""
    try:
        content = _content(path)
        text = content.decode("utf-8")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        try:
            neighbours = sorted(os.listdir(path.parent))
        except OSError:
            neighbours = []
        reason = f"no such file{did_you_mean(path.name, neighbours)}"
    except ImportError as error:
        reason = no_package(error)
    except IsADirectoryError:
        reason = (
            "is a directory; give the path of a YAML file, such as the config.yaml of a run; in "
            "Python, `trainer.load` reads checkpoints"
        )
    except UnicodeDecodeError as error:
        lines = error.object.count(b"\n", 0, error.start) + 1
        line = f":{lines}"
        reason = f"not UTF-8 text, at byte {error.start}; save it as UTF-8"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    except ValueError as error:  # of `_content`
        reason = f"cannot be read: {error}"
    raise ConfigError([f"{path}{line}: {reason}"], str(path))


def _content(path: epath.Path) -> bytes:
    """Return the bytes of a file; raise ValueError if it cannot be a configuration."""
    # Opening a pipe would wait for its other end.
    if paths.is_local(path) and not stat.S_ISREG(os.stat(path).st_mode) and not path.is_dir():
        raise ValueError("it is a pipe or a device; give the path of a YAML file")
    with path.open("rb") as file:
        content = file.read(_LARGEST_FILE + 1)
    if len(content) > _LARGEST_FILE:
        raise ValueError(
            f"it has more than {_LARGEST_FILE:,} bytes, the most that a configuration may have; "
            f"give a smaller file"
        )
    return content


# --- checking -------------------------------------------------------------------------------------


class _Checked(NamedTuple):
    """Hold a section. If it is not valid, hold its valid settings, or None if there are none."""

    section: Any
    is_valid: bool


def _section(draft: Draft, name: str) -> _Checked:
    """Return a section if it is valid, else report its problems, and return what is valid."""
    field, value = draft.root.model_fields[name], draft.values.get(name)
    if value is None:  # `mesh:` with nothing below it is an empty section: the defaults
        if not field.is_required():
            return _Checked(field.default, True)
        value = {}
    if not isinstance(value, dict):
        _report(draft, (name,), messages.not_a_section(name, value))
        return _Checked(None, False)
    models = section_models(name, draft.root)
    kind = ""
    if "" not in models:
        kind, kinds = value.get("kind"), list(models)
        if not isinstance(kind, str) or kind not in models:
            problem = messages.unknown_kind(name, kind, kinds, draft.root)
            if "kind" not in value:
                problem = messages.no_kind(name, kinds)
            _report(draft, (name, "kind"), problem)
            return _Checked(_check_without_kind(draft, name, value), False)
    try:
        return _Checked(models[kind].model_validate(value), True)
    except pydantic.ValidationError as error:
        problems = _by_path((name,), error)
        for path, message in _messages(draft, models[kind], kind, problems).items():
            _report(draft, path, message)
        return _Checked(_without(problems, models[kind], value), False)


def _without(problems: Iterable[KeyPath], model: type[Section], value: dict[Any, Any]) -> Section:
    """Return a section of the valid settings, without attributes for the others."""
    invalid = {path[1] for path in problems if len(path) > 1}
    if not invalid <= model.model_fields.keys():  # an unknown key may stand for a setting left out
        invalid |= model.model_fields.keys() - value.keys()
    partial = model.model_construct(**_converted(model, value.keys() - invalid, value))
    settings: Any = vars(partial)
    for field in invalid:
        settings.pop(field, None)  # `model_construct` has set its default
    return partial


def _converted(
    model: type[Section], fields: Iterable[Any], value: dict[Any, Any]
) -> dict[str, Any]:
    """Return valid settings in the types of the model: numbers in place of texts, for example."""
    known = [field for field in fields if field in model.model_fields]
    types_of: dict[str, Any] = {field: model.model_fields[field].annotation for field in known}
    return {
        field: pydantic.TypeAdapter(types_of[field]).validate_python(value[field])
        for field in known
    }


def _check_without_kind(draft: Draft, name: str, value: dict[Any, Any]) -> types.SimpleNamespace:
    """Report the fields that all kinds with this field refuse for the same reason.

    Return the settings that all kinds have and accept.
    """
    refused: dict[type[Section], dict[KeyPath, list[Any]]] = {}
    for model in dict.fromkeys(section_models(name, draft.root).values()):
        try:
            model.model_validate({k: v for k, v in value.items() if k in model.model_fields})
        except pydantic.ValidationError as error:
            refused[model] = _by_path((name,), error)
        else:
            refused[model] = {}
    for field in value.keys() - {"kind"}:
        path = (name, field)
        owners = [
            _messages(draft, model, "", {p: e for p, e in problems.items() if p[:2] == path})
            for model, problems in refused.items()
            if field in model.model_fields
        ]
        if not isinstance(field, str):
            _report(draft, path, messages.not_a_name(path))
        elif not owners:
            _report(draft, path, messages.unknown_key(path, draft.root))
        elif all(worded == owners[0] for worded in owners):
            for place, message in owners[0].items():
                _report(draft, place, message)
    shared = {
        field
        for field in value.keys() - {"kind"}
        if all(field in model.model_fields for model in refused)
        and not any(path[:2] == (name, field) for places in refused.values() for path in places)
    }
    return types.SimpleNamespace(**_converted(next(iter(refused)), shared, value))


def _messages(
    draft: Draft, model: type[Section], kind: str, problems: Mapping[KeyPath, list[Any]]
) -> dict[KeyPath, str]:
    """Word the problems of a section of this kind, by the path of the value."""
    worded = {}
    for path, errors in problems.items():
        if errors[0]["type"] == "extra_forbidden":
            kind_place = draft.find((path[0], "kind"))
            overridden = kind_place.order >= _AFTER_THE_FILE
            message = messages.unknown_key(path, draft.root, kind, kind_is_overridden=overridden)
            if item := messages.item_section(model, path):
                message = messages.unknown_key_of_item(path, item)
        else:
            item = messages.item_section(model, path)
            field = (item or model).model_fields.get(path[-1] if item else path[1])
            message = messages.describe(path, errors, field)
        worded[path] = message
    return worded


def _by_path(root: KeyPath, error: pydantic.ValidationError) -> dict[KeyPath, list[Any]]:
    """Group pydantic's errors by the path of the value in what was given.

    Pydantic's own path also names the branch of a union; a name after an index is a key. A value
    that may be a word or a list fails as each of them: if it fails inside the list, a list was
    meant. A list with an item that fails also fails as too short.
    """
    groups: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        path = (*root, *item["loc"])
        path = (
            *path[:2],
            *(
                step
                for before, step in pairwise(path[1:])
                if isinstance(step, int) or isinstance(before, int)
            ),
        )
        groups.setdefault(path, []).append(item)
    with_items = {path[:end] for path in groups for end in range(2, len(path))}
    return {path: group for path, group in groups.items() if path not in with_items}


def _report(draft: Draft, path: KeyPath, message: str) -> None:
    """Add a problem, unless the value could not be read at all."""
    if not any(path[:end] in draft.unreadable for end in range(len(path) + 1)):
        draft.report(draft.find(path), message)


def _error(draft: Draft) -> ConfigError:
    return ConfigError(draft.lines(), draft.file or "the configuration")
