"""From YAML, dicts and `a.b=c` overrides to a `Config`, or to a list of everything that is wrong.

    load("configs/x.yaml", ["mesh.stages=4"])

A bad file costs one reading: every problem is reported at once, with the line (or the override)
that caused it. `yaml_source` reads values and notes their places; pydantic then finds the problems
of the values, the place of each is looked up by its path, and `messages` words it.
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import pydantic
import yaml
from etils import epath

from gpipe_jax.config import Section
from gpipe_jax.config.messages import KeyPath, describe, show
from gpipe_jax.config.run import Config, section_models, unused
from gpipe_jax.config.yaml_parser import Draft, Location, YamlError, override, parse
from gpipe_jax.errors import ConfigError
from gpipe_jax.utils import text as hints

Source = str | os.PathLike[str] | Mapping[str, Any] | Section
C = TypeVar("C", bound=Section)

_AFTER_THE_FILE = 10**9  # more than any line number


def load(source: Source, overrides: Iterable[str] = ()) -> Config:
    """The configuration in a YAML file (or given as values), after `section.field=value` overrides.

    Raises `ConfigError`, and nothing else, for bad input of any kind.
    """
    return load_as(Config, source, overrides)


def load_as(root: type[C], source: Source, overrides: Iterable[str] = ()) -> C:
    """The same for another kind of configuration, a model whose fields are sections."""
    config = _validate(_draft(source, overrides, root))
    assert isinstance(config, root)
    return config


def place(
    source: Source,
    overrides: Iterable[str],
    section: str,
    message: str,
    root: type[Section] = Config,
) -> str:
    """Where it was written what `message` is about: `x.yaml:3`, or the override.

    This is the first field of the section that the message has in backticks, or else the section.
    """
    draft = _draft(source, overrides, root)
    fields = [(section, name) for name in re.findall(r"`(\w+)`", message)]
    written = [path for path in fields if path in draft.places]
    return draft.find(written[0] if written else (section,)).label


def dump(config: Section) -> str:
    """The configuration as YAML, every default written out; loading it gives an equal one."""
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
        defaults = dict(type(section).model_construct())  # without those that are required
        if "kind" in defaults:
            usual = Config.model_fields[name].default
            defaults["kind"] = getattr(usual, "kind", section.kind)
        for field, value in section:
            default = defaults.get(field)
            if value != default:
                found[f"{name}.{field}"] = (default, value)
    return found


def without_effect(config: Config) -> list[str]:
    """One line for each setting that is not at its default, and does nothing."""
    changed, dead = differences(config), unused(config)
    return [f"{name} has no effect with {dead[name]}" for name in dead if name in changed]


def compare(there: Config, here: Config) -> list[str]:
    """One line for each setting in which two configurations differ; empty if they are equal.

    Settings that do nothing in both are left out.
    """
    left, right = (
        {f"{name}.{field}": value for name, section in config for field, value in section}
        for config in (there, here)
    )
    lines = []
    dead = unused(there).keys() & unused(here).keys()
    for name in [name for name in left | right if name not in dead]:
        a, b = (
            [show(side[name]), side[name]] if name in side else ["absent"] for side in (left, right)
        )
        if a != b:
            lines.append(f"{name}: {a[0]} there, {b[0]} here")
    return lines


class _Dumper(yaml.SafeDumper):
    """Writes lists on one line, as people do."""

    def represent_sequence(self, tag: str, sequence: Any, flow_style: bool | None = None) -> Any:
        return super().represent_sequence(tag, sequence, flow_style=True)


def _draft(source: Source, overrides: Iterable[str], root: type[Section] = Config) -> Draft:
    if isinstance(source, str | os.PathLike):
        draft = _read(epath.Path(source), root)
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


def _read(path: epath.Path, root: type[Section]) -> Draft:
    draft = Draft(str(path), root)
    try:
        parse(draft, _text(path))
    except YamlError as error:
        draft.report(draft.line(error.line), str(error))
        raise _error(draft) from None
    return draft


def no_package(error: ImportError) -> str:
    """The problem that a package is missing which an address needs."""
    return f"{error}; for gs:// run pip install 'gpipe-jax[tpu]', or 'etils[epath-gcs]'"


def _text(path: epath.Path) -> str:
    line = ""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        try:
            neighbours = sorted(os.listdir(path.parent))
        except OSError:
            neighbours = []
        reason = f"no such file{hints.did_you_mean(path.name, neighbours)}"
    except ImportError as error:
        reason = no_package(error)
    except IsADirectoryError:
        reason = "is a directory; give the path of a YAML file"
    except UnicodeDecodeError as error:
        lines = error.object.count(b"\n", 0, error.start) + 1
        line = f":{lines}"
        reason = f"not UTF-8 text, at byte {error.start}; save it as UTF-8"
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise ConfigError([f"{path}{line}: {reason}"], str(path))


def _validate(draft: Draft) -> Section:
    # `mesh:` with nothing below it is an empty section, which is to say the defaults.
    given = {
        name: value
        for name, value in draft.values.items()
        if value is not None or name not in draft.root.model_fields
    }
    try:
        config = draft.root.model_validate(given)
    except pydantic.ValidationError as error:
        for path, group in _by_path(error, draft.root).items():
            if not any(path[:end] in draft.unreadable for end in range(len(path) + 1)):
                draft.report(draft.find(path), describe(draft.values, path, group, draft.root))
    else:
        if not draft.problems:
            return config
    raise _error(draft)


def _by_path(error: pydantic.ValidationError, root: type[Section]) -> dict[KeyPath, list[Any]]:
    """Pydantic's errors by the path of the value in what was given.

    Pydantic's own path also names the kind of a section and the branch of a union. A value that may
    be a word or a list fails as each of them: if it fails inside the list, a list was meant.
    """
    groups: dict[KeyPath, list[Any]] = {}
    for item in error.errors(include_url=False):
        section, *rest = item["loc"]
        has_kinds = section in root.model_fields and "" not in section_models(str(section), root)
        if has_kinds and item["type"] != "cross_check":
            rest = rest[1:]
        if not rest and item["type"] in ("missing", "union_tag_not_found", "union_tag_invalid"):
            rest = ["kind"]
        path = (section, *rest[:1], *(part for part in rest[1:] if isinstance(part, int)))
        groups.setdefault(path, []).append(item)
    with_items = {path[:2] for path in groups if len(path) > 2}
    return {path: group for path, group in groups.items() if path not in with_items}


def _error(draft: Draft) -> ConfigError:
    return ConfigError(draft.lines(), draft.path or "the configuration")
