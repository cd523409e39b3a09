"""Write the reference pages from the code: public names, command lines, settings.

Sphinx calls `setup`. The pages go to docs/reference/generated/, which git ignores; so there is no
second list of names, options or settings that could become stale.
"""

import argparse
import inspect
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import gpipe_jax
import nas
from gpipe_jax.cli import main as gpipe_cli
from gpipe_jax.config.base import Mark
from gpipe_jax.config.run import Config, section_models
from nas import cli as nas_cli
from nas.config import SearchConfig

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "reference" / "generated"


def setup(app: Any) -> dict[str, bool]:
    """Register the extension."""
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("builder-inited", lambda app: write_all())
    app.connect("autodoc-skip-member", _skip_member)
    # After napoleon, whose priority is 500.
    app.connect("autodoc-process-docstring", _literals, priority=900)
    return {"parallel_read_safe": True}


def write_all() -> None:
    """Write every generated page; delete those of names that no longer exist."""
    pages = {
        **api_pages(gpipe_jax),
        **api_pages(nas),
        "cli.rst": "\n".join(cli_page()),
        "config.rst": "\n".join(config_page()),
    }
    OUT.mkdir(parents=True, exist_ok=True)
    for path in OUT.iterdir():
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = OUT / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# --- reStructuredText -----------------------------------------------------------------------------


def heading(text: str, underline: str) -> list[str]:
    """Return a heading and an empty line."""
    return [text, underline * len(text), ""]


def plain(text: str) -> str:
    """Return text in which `names` are literals and nothing else is markup."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return _escape(text)
    return "".join(
        f"``{part}``" if place % 2 else _escape(part) for place, part in enumerate(parts)
    )


def _escape(text: str) -> str:
    return re.sub(r"([\\*`|_])", r"\\\1", text)


def table(header: Iterable[str], rows: Iterable[Iterable[str]], widths: str) -> list[str]:
    """Return a list-table."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in [header, *rows]:
        first, *rest = row
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in rest)]
    return [*lines, ""]


def first_line(value: object) -> str:
    """Return the first line of a docstring of its own, or nothing."""
    return plain((inspect.getdoc(value) or "").partition("\n")[0])


def first_paragraph(value: object) -> str:
    """Return the first paragraph of a docstring in one line."""
    return plain(" ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split()))


# --- public names ---------------------------------------------------------------------------------


def api_pages(package: types.ModuleType) -> dict[str, str]:
    """Return the pages of a package: an overview, and one for each public name."""
    names = list(package.__all__)
    groups = {
        "Classes": [n for n in names if _is_class(getattr(package, n))],
        "Functions": [n for n in names if inspect.isfunction(getattr(package, n))],
        "Modules": [n for n in names if inspect.ismodule(getattr(package, n))],
        "Exceptions": [n for n in names if _is_exception(getattr(package, n))],
    }
    assert sum(map(len, groups.values())) == len(names), f"{package.__name__}: a name of no group"
    lines = heading(package.__name__, "=")
    pages = {}
    for title, members in groups.items():
        if members:
            lines += heading(title, "-")
            rows = [
                (f":doc:`{name} <{_page(package, name)}>`", first_line(getattr(package, name)))
                for name in members
            ]
            lines += table(("name", "what it is for"), rows, "25 75")
    lines += [".. toctree::", "   :hidden:", ""]
    for name in sorted(names, key=str.lower):
        page = _page(package, name)
        lines.append(f"   {name} <{page}>")
        full = f"{package.__name__}.{name}"
        pages[f"{page}.rst"] = "\n".join(name_page(full, getattr(package, name)))
    return {f"{package.__name__}.rst": "\n".join([*lines, ""]), **pages}


def _page(package: types.ModuleType, name: str) -> str:
    """Return the name of a page; `layer` and `Layer` differ also where case does not count."""
    taken = inspect.isfunction(getattr(package, name)) and hasattr(package, name.capitalize())
    return f"{package.__name__}.{name}" + ("_function" if taken else "")


def name_page(full: str, value: Any) -> list[str]:
    """Return the page of a public name."""
    lines = heading(full, "=")
    if not inspect.ismodule(value):
        return [*lines, *_directive(full, value)]
    lines += [f".. automodule:: {full}", "   :no-members:", ""]
    members = getattr(value, "__all__", None) or [
        name
        for name, member in vars(value).items()
        if not name.startswith("_") and getattr(member, "__module__", None) == value.__name__
    ]
    data = []
    for name in members:
        member = getattr(value, name)
        if inspect.isfunction(member) or inspect.isclass(member):
            lines += _directive(f"{full}.{name}", member)
        elif not inspect.ismodule(member):
            data.append((f"``{name}``", f"``{type(member).__name__}``"))
    if data:
        lines += [*heading("Constants", "-"), *table(("name", "type"), data, "50 50")]
    return lines


def _directive(full: str, value: Any) -> list[str]:
    kind = "autofunction"
    if inspect.isclass(value):
        kind = "autoexception" if issubclass(value, BaseException) else "autoclass"
    lines = [f".. {kind}:: {full}"]
    if kind == "autoexception" and ".errors." not in full:
        lines.append("   :no-index:")  # references go to the page of `errors`
    if kind == "autoclass" and issubclass(value, BaseModel):
        fields = "Its fields are the sections of :doc:`the settings <config>`."
        return [*lines, "   :no-members:", "", fields, ""]
    return [*lines, ""]


def _is_exception(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, BaseException)


def _is_class(value: Any) -> bool:
    return inspect.isclass(value) and not _is_exception(value)


def _skip_member(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool:
    """Skip the fields of NamedTuples that have no description of their own."""
    return skip or (inspect.getdoc(value) or "").startswith("Alias for field number")


def _literals(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Make `names` literals, and take `*` and `|` elsewhere as plain characters.

    Docstrings are written for readers of the code, with one backtick. Code blocks stay as they are.
    """
    if what == "module":
        lines[:] = _with_drawings(lines)
    block: int | None = None  # the indentation of the line that began a code block
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if block is not None and line.strip() and indent <= block:
            block = None
        if block is None and not line.lstrip().startswith((">>>", "..", ":py:", "* ")):
            lines[number] = _with_literals(line)
        if block is None and line.rstrip().endswith("::"):
            block = indent


def _with_drawings(lines: list[str]) -> list[str]:
    """Make the paragraphs of a module's docstring that have indented lines code blocks."""
    paragraphs = "\n".join(lines).split("\n\n")
    for place, paragraph in enumerate(paragraphs):
        if re.search(r"^ ", paragraph, re.MULTILINE) and "::" not in paragraph:
            paragraphs[place] = "::\n\n" + "\n".join(f"   {x}" for x in paragraph.split("\n"))
    return "\n\n".join(paragraphs).split("\n")


def _with_literals(line: str) -> str:
    if "``" in line or ":`" in line or line.count("`") % 2:
        return line
    parts = line.split("`")
    parts[::2] = [re.sub(r"(?<![\\*])(\*+|\|)", _backslash, part) for part in parts[::2]]
    for place in range(1, len(parts), 2):
        glue = "\\ " if parts[place + 1][:1].isalnum() else ""
        parts[place] = f"``{parts[place]}``{glue}"
    return "".join(parts)


def _backslash(match: re.Match[str]) -> str:
    return "".join(f"\\{letter}" for letter in match[0])


SHELLS = """\
``python -m gpipe_jax`` is ``gpipe``. :doc:`../commands` is a short index and sets up completion in
a shell. :doc:`../errors_and_exit_codes` lists the exit codes.
"""


# --- command lines --------------------------------------------------------------------------------


def cli_page() -> Iterator[str]:
    """Yield the page of both command lines."""
    yield from heading("Commands", "=")
    yield from (SHELLS, "")
    for parser in (gpipe_cli.parser(), nas_cli._parser()):
        yield from heading(parser.prog, "-")
        yield from (plain(parser.description or ""), "")
        yield from _options(parser)
        for name, command in _commands(parser).items():
            yield from heading(f"{parser.prog} {name}", "~")
            yield from (plain(command.description or ""), "")
            yield from (".. code-block:: text", "")
            yield from (f"   {line}".rstrip() for line in command.format_usage().splitlines())
            yield ""
            yield from _options(command)


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _options(parser: argparse.ArgumentParser) -> list[str]:
    rows = [
        (_option(action), _default(action), plain(_help(parser, action)))
        for action in parser._actions
        if not isinstance(action, argparse._SubParsersAction | argparse._HelpAction)
        and action.help != argparse.SUPPRESS
    ]
    return table(("option", "default", "meaning"), rows, "34 16 50") if rows else []


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = (action.help or "").replace(" (%(default)s)", "")  # it has a column of its own
    return text % {**vars(action), "prog": parser.prog}


def _option(action: argparse.Action) -> str:
    value = action.metavar or (None if action.nargs == 0 else action.dest.upper())
    if action.choices is not None:
        value = "{" + ", ".join(map(str, action.choices)) + "}"
    if not action.option_strings:
        return f"``{action.metavar or action.dest}``"
    names = ", ".join(action.option_strings)
    return f"``{names} {value}``" if action.nargs != 0 and value else f"``{names}``"


def _default(action: argparse.Action) -> str:
    if not action.option_strings:
        return "" if action.nargs in ("*", "?") else "required"
    if action.required:
        return "required"
    return "" if action.default in (None, False, argparse.SUPPRESS) else f"``{action.default}``"


# --- settings -------------------------------------------------------------------------------------


def config_page() -> Iterator[str]:
    """Yield the page of the settings of `gpipe` and of `nas`."""
    yield from heading("Settings", "=")
    for title, root in (("gpipe", Config), ("nas", SearchConfig)):
        yield from heading(title, "-")
        yield from (first_paragraph(root), "")
        for section, field in root.model_fields.items():
            yield from heading(section, "~")
            description = field.description or ""
            yield from (plain(description[:1].upper() + description[1:]) + ".", "")
            for kind, model in section_models(section, root).items():
                if kind:
                    yield from heading(f"{section}.kind: {kind}", "^")
                yield from (first_paragraph(model), "")
                yield from _fields(model)


def _fields(model: Any) -> list[str]:
    schema = model.model_json_schema()
    rows = []
    for name, field in schema["properties"].items():
        if name == "kind":
            continue
        if name in schema.get("required", ()):
            default = "required"
        else:
            default = f"``{_yaml(field.get('default'))}``"
        text = plain(model.model_fields[name].description or "")
        if model.mark(name) in (Mark.LAYOUT, Mark.OPERATION):
            text += " (*may change on resume*)"
        rows.append((f"``{name}``", plain(_type(field)), default, text))
    header = ("name", "type", "default", "meaning")
    return table(header, rows, "20 24 16 40") if rows else ["It has no settings.", ""]


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return str(value)


def _type(field: dict[str, Any]) -> str:
    """Return a JSON schema's type in words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(choice) for choice in field["anyOf"]))
    if "enum" in field:
        return " | ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field.get("type")
    if kind == "array":
        return f"list of {_type(field.get('items', {}))}".replace("number", "numbers", 1)
    if kind == "string":
        return "text"
    words = {"integer": "whole number", "number": "number", "boolean": "true or false"}
    return " ".join(filter(None, [words.get(str(kind), str(kind)), _bounds(field)]))


def _bounds(field: dict[str, Any]) -> str:
    """Return the limits of a number, without the general one of 32 bits."""
    texts = []
    for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("exclusiveMaximum", "<")):
        if key in field:
            texts.append(f"{sign} {field[key]:g}")
    if field.get("maximum", 2**31 - 1) != 2**31 - 1:
        texts.append(f"<= {field['maximum']:,}")
    return ", ".join(texts)
