"""Check the documentation: commands parse, Python blocks compile, files exist, devices add up.

The pages are those of docs/ and the README. `sphinx-build -W` checks the links between pages and
executes the tutorials.
"""

import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
import typing
from argparse import ArgumentParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from paths import REPOSITORY as ROOT

from gpipe_jax.cli import main as cli
from gpipe_jax.config import loader
from gpipe_jax.config.run import Config, section_models
from gpipe_jax.schedules import generators, schedule, simulation
from gpipe_jax.tpu_compiler import topologies
from gpipe_jax.training import from_config
from gpipe_jax.utils import console
from nas import cli as nas_cli
from nas.config import SearchConfig

DOCS = ROOT / "docs"
GUIDES = DOCS / "guides"
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts),
]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES}
SPEC = yaml.safe_load((GUIDES / "jobset.yaml").read_text())["spec"]
JOB = SPEC["replicatedJobs"][0]["template"]["spec"]
SKY = yaml.safe_load((GUIDES / "skypilot.yaml").read_text())
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PARSERS = {"gpipe": cli.parser(), "nas": nas_cli._parser()}
# Pages that name a TPU to rent: its devices are those of the config.
LAUNCHING = ("docs/guides/cloud_tpu.md", "docs/guides/gke.md", "docs/guides/skypilot.md")
OTHER_COMMANDS = {
    *("docker", "eval", "gcloud", "kubectl", "mpirun", "pip", "python3", "sky", "srun"),
    *("pyright", "pytest", "ruff", "sphinx-build"),
}


# --- what is launched -----------------------------------------------------------------------------


def trained(words: list[str]) -> Config:
    """Return the config that a training command names."""
    assert words[1:4] == ["-m", "gpipe_jax", "train"]
    return loader.load(ROOT / words[4], words[5:])


def devices(config: Config) -> int:
    """Return the number of devices of a config that trains on real ones."""
    assert config.mesh.simulate is None and (config.train.workdir or "").startswith("gs://")
    return config.mesh.stages * config.mesh.data


def test_jobset() -> None:
    pod = JOB["template"]["spec"]
    (container,) = pod["containers"]
    (failed,) = JOB["podFailurePolicy"]["rules"]
    assert failed["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [cli.BAD_INPUT],
    }
    assert SPEC["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert JOB["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert JOB["parallelism"] == JOB["completions"]
    shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = JOB["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert chips == topologies.parse(f"v5e:{shape}").devices
    assert chips == devices(trained(container["command"]))


def test_skypilot() -> None:
    name = SKY["resources"]["accelerators"].removeprefix("tpu-")
    assert devices(trained(shlex.split(SKY["run"]))) == topologies.parse(name).devices
    assert 2 not in SKY["resources"]["job_recovery"]["recover_on_exit_codes"]


# --- files and extras -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [*PAGES, *GUIDES.glob("*.yaml"), *(ROOT / "scripts").glob("*.sh")], ids=lambda p: p.name
)
def test_extras_and_links(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for extras in re.findall(r"\.\[([a-z,]+)\]|gpipe-jax\[([a-z,]+)\]", text):
        assert set("".join(extras).split(",")) <= set(EXTRAS)
    for target in re.findall(r"docs/([\w/]+\.(?:md|yaml))", text):
        assert (DOCS / target).exists(), target
    for target in re.findall(r"\]\(([^)#:]+\.(?:md|yaml))", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_it_names_exists(page: str) -> None:
    for name in re.findall(r"`((?:\w+/)+|(?:\w+/)+\w+\.(?:py|yaml|sh|ipynb|md))`", TEXTS[page]):
        assert (ROOT / name).exists() or (ROOT / "gpipe_jax" / name).exists(), name


def test_the_table_of_changes_names_what_exists() -> None:
    """Check each name of "Where to change what": the file that is named beside it defines it."""
    _, _, section = TEXTS["docs/contributing.md"].partition("\n## Where to change what\n")
    rows = [line for line in section.partition("\n## ")[0].splitlines() if "`" in line]
    assert len(rows) > 8
    checked = 0
    for row in rows:
        files = [ROOT / name for name in re.findall(r"`((?:gpipe_jax|nas)/[\w/.]*)`", row)]
        sources = [
            path for file in files for path in (file.glob("*.py") if file.is_dir() else [file])
        ]
        words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in sources)))
        names = re.findall(r"`(?:\w+\.)?(\w+)`", row)
        assert set(names) <= words, row
        for name, file in re.findall(r"`(\w+)` (?:in|of) `([\w/]+\.py)`", row):
            source = (ROOT / file).read_text()
            assert re.search(rf"^(class |def )?{name}\b", source, re.M), row
            checked += 1
    assert checked > 8


def test_the_tree_is_current() -> None:
    """Compare the tree in contributing.md with what the script prints."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "architecture.py"], capture_output=True, text=True
    )
    assert f"```text\n{done.stdout}```" in TEXTS["docs/contributing.md"], (
        "paste the output of `python scripts/architecture.py` into docs/contributing.md"
    )


def test_every_page_is_in_the_table_of_contents() -> None:
    entries = re.findall(r"^[\w/]+$", TEXTS["docs/index.md"], re.MULTILINE)
    for page in TEXTS:
        name = page.removeprefix("docs/").removesuffix(".md")
        assert name in ("README", "index") or name in entries, page


# --- commands -------------------------------------------------------------------------------------


def block_commands(text: str) -> list[list[str]]:
    """Return the words of every command in blocks and cells of shell lines."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    cells = re.findall(r"^!(.*)$", text, re.MULTILINE)
    lines = [*"".join(blocks).replace("\\\n", " ").splitlines(), *cells]
    commands = [part for line in lines for part in re.split(r" && ", line.partition(" #")[0])]
    return [shlex.split(part, comments=True) for part in commands if part.strip()]


def inline_commands(text: str) -> list[list[str]]:
    """Return the words of every command within a sentence; it may leave arguments out."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    starts = ("gpipe ", "nas ", "python scripts/")
    return [span.split() for span in spans if span.startswith(starts) and "|" not in span]


def subparser(program: str, command: str) -> ArgumentParser:
    """Return the parser of one command; fail if there is no such command."""
    (choices,) = (a.choices for a in PARSERS[program]._actions if isinstance(a.choices, dict))
    assert command in choices, f"{program} {command}"
    return choices[command]


def check_script(words: list[str]) -> None:
    """Check that a script exists and has every option that is given."""
    path = ROOT / words[1]
    assert path.exists(), words
    source = path.read_text() + (ROOT / "scripts" / "tables.py").read_text()
    for word in words[2:]:
        if word.startswith("--"):
            assert f'"{word.partition("=")[0]}"' in source, f"{words[1]} has no option {word}"


def check_config(page: str, options: Any) -> None:
    """Check that a config of this repository is valid with these overrides."""
    path = ROOT / options.config
    if not path.is_file():
        return
    config = loader.load(path, options.overrides)
    if getattr(options, "topology", None):
        have = topologies.parse(options.topology).devices
        need = config.mesh.stages * config.mesh.data
        assert need == have if page in LAUNCHING else need <= have


BLOCKS = [(page, words) for page, text in TEXTS.items() for words in block_commands(text)]
INLINE = [(page, words) for page, text in TEXTS.items() for words in inline_commands(text)]


def label(value: Any) -> str:
    """Return the name of a case."""
    return value if isinstance(value, str) else "-".join(value[:2])


@pytest.mark.parametrize(("page", "words"), BLOCKS, ids=label)
def test_commands_in_blocks(page: str, words: list[str]) -> None:
    if words[0].startswith("scripts/"):
        done = subprocess.run(
            [ROOT / words[0], *words[1:], "--dry-run"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        options = [word for word in words if "=" in word]
        assert all(option in done.stdout for option in options)
    elif words[0] == "gpipe":
        options = console.parse(PARSERS["gpipe"], words[1:])
        if getattr(options, "config", None):
            check_config(page, options)
    elif words[0] == "nas":
        options = console.parse(PARSERS["nas"], words[1:])
        if getattr(options, "config", None):
            loader.load_as(SearchConfig, ROOT / options.config, options.overrides)
    elif words[0] == "python":
        check_script(words)
    else:
        assert words[0] in OTHER_COMMANDS or words[:2] == [".", ".venv/bin/activate"], words


@pytest.mark.parametrize(("page", "words"), INLINE, ids=label)
def test_commands_in_sentences(page: str, words: list[str]) -> None:
    if words[0] == "python":
        check_script(words)
        return
    command = PARSERS[words[0]] if words[1].startswith("-") else subparser(words[0], words[1])
    known = command._option_string_actions
    for word in words[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in known, f"{page}: {' '.join(words)}"


def test_the_commands_of_the_pages_are_seen() -> None:
    assert len(BLOCKS) > 50 and len(INLINE) > 30
    programs = {words[0] for _, words in BLOCKS}
    assert {"gpipe", "nas", "python", "scripts/tpu_pod.sh"} - {"python"} <= programs
    with pytest.raises(SystemExit):
        test_commands_in_blocks("", ["gpipe", "train", "x.yaml", "--no-such-option"])
    with pytest.raises(AssertionError, match="has no option --no-such"):
        test_commands_in_sentences("", ["python", "scripts/crash_test.py", "--no-such"])
    with pytest.raises(AssertionError):
        test_commands_in_sentences("", ["nas", "export", "--no-such"])


def test_the_index_lists_every_command_with_its_help() -> None:
    page = TEXTS["docs/reference/commands.md"]
    rows = set(re.findall(r"^\| `(\w+ \w+)` \| (.*) \|$", page, re.MULTILINE))
    expected = set()
    for program, parser in PARSERS.items():
        (action,) = (a for a in parser._actions if isinstance(a.choices, dict))
        helps = typing.cast(Any, action)._choices_actions
        expected |= {(f"{program} {choice.dest}", choice.help.replace("`", "")) for choice in helps}
    assert rows == expected


# --- Python ---------------------------------------------------------------------------------------


def python_blocks(text: str) -> list[str]:
    """Return the Python blocks and cells of a page, without those that are for another program."""
    fence = r"^```(?:python|\{code-cell\} python)\n(?::tags: .*\n)?(.*?)^```"
    blocks = re.findall(fence, text, re.DOTALL | re.MULTILINE)
    return [block for block in blocks if not block.startswith(("%%", "!"))]


def test_a_cell_with_a_failing_command_fails_the_build() -> None:
    for page, text in TEXTS.items():
        commands = re.findall(r"^!", text, re.MULTILINE)
        checked = re.findall(r"^!.*\n```\n+[^\n]*\n:tags.*\n+assert _exit_code == 0", text, re.M)
        assert len(commands) == len(checked), page


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if python_blocks(text)])
def test_python_blocks_compile(page: str) -> None:
    for block in python_blocks(TEXTS[page]):
        compile(block, page, "exec")


SMALL = ("guides/own_layers", "guides/skips_and_ties", "guides/schedules", "guides/export")


@pytest.mark.parametrize("name", [*SMALL, "concepts/evolution_and_replay"])
def test_python_blocks_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the blocks of a page one after the other, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    for block in python_blocks(TEXTS[f"docs/{name}.md"]):
        exec(block, module.__dict__)
    printed = capsys.readouterr().out.split()
    expected = {"guides/own_layers": ["4522"], "guides/skips_and_ties": ["16576", "20544"]}
    assert all(number in printed for number in expected.get(name, []))


def test_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the examples of data.md as they are."""
    monkeypatch.chdir(tmp_path)
    page = TEXTS["docs/guides/data.md"]
    writing, making = python_blocks(page)
    sections = re.findall(r"```yaml\n(data: .*?)```", page, re.DOTALL)
    kinds = {value["data"]["kind"]: value["data"] for value in map(yaml.safe_load, sections)}
    exec(writing, {})
    Path("my_data.py").write_text(making)
    own = {name: kinds[name] for name in ("array_record", "python")}
    models = {"array_record": {"kind": "convnet"}, "python": {"kind": "mlp", "features": [64, 2]}}
    for name, section in own.items():
        section["batch_size"] = 32
        config = loader.load({"model": models[name], "data": section})
        data = from_config.dataset(config)
        batch = next(data.train(3, np.arange(4)))
        assert len(batch["labels"]) == 4 and len(next(data.test())["labels"])
    assert set(kinds) == {"text", "arrays", "array_record", "python"}
    values = {"model": models["python"], "data": kinds["python"], "train": {"steps": 2}}
    Path("x.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["train", "x.yaml"]) == 0


@pytest.mark.parametrize("page", TEXTS)
def test_yaml_blocks_are_valid_settings(page: str) -> None:
    """Check every block of settings: its keys are fields of its sections."""
    for block in re.findall(r"```yaml\n(.*?)```", TEXTS[page], re.DOTALL):
        for name, values in yaml.safe_load(block).items():
            root: Any = Config if name in Config.model_fields else SearchConfig
            models = section_models(name, root)
            fields = models[values.get("kind", "")].model_fields if models else {}
            assert set(values) <= set(fields), name


# --- figures --------------------------------------------------------------------------------------


def simulated_time(table: schedule.Schedule) -> float:
    """Return the time of a step in forward times of a device.

    The last stage's forward is part of its backward.
    """
    count, V = table.num_devices * table.chunks, table.chunks
    forward = [*[1 / V] * (count - 1), 0.0]
    return simulation.simulate(table, forward, [3 / V] * count).time


def test_the_table_of_schedules() -> None:
    tables = [generators.make(kind, 8, 32) for kind in ("gpipe", "1f1b", "eager_1f1b")]
    tables.append(generators.interleaved(8, 32, 2))
    times = [simulated_time(table) for table in tables]
    page = TEXTS["docs/guides/schedules.md"]
    row = re.search(r"\| time of a step.*?\|(.*)\|", page)
    assert row and row[1].replace("|", " ").split() == [f"{time:.0f}" for time in times]
    row = re.search(r"\| stage inputs stashed, at most.*?\|(.*)\|", page)
    assert row and [int(v) for v in row[1].split("|")] == [max(t.peak_stash) for t in tables]


def test_every_schedule_is_described() -> None:
    page = TEXTS["docs/guides/schedules.md"]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(generators.TRAINING)


def test_nothing_is_left_to_fill_in() -> None:
    for page, text in TEXTS.items():
        assert not re.search(r"TODO|RECORDED|\(recorded\)", text), page


def test_the_changelog_names_what_exists() -> None:
    page = TEXTS["docs/changelog.md"]
    modules = re.search(r"### Modules.*?```text\n(.*?)```", page, re.DOTALL)
    assert modules and len(modules[1].splitlines()) > 140
    for line in modules[1].splitlines():
        folder, _, names = line.split()[1].partition("{")
        for name in names.rstrip("}").split(","):
            assert importlib.util.find_spec(folder + name), line
    for section in ("Public names", "Exceptions"):
        (text,) = re.findall(rf"### {section}\n(.*?)\n### ", page, re.DOTALL)
        new = re.findall(r"`((?:gpipe_jax|nas)\.[\w.]+)`", "\n".join(text.split("| ")[2::2]))
        assert len(new) > 3 and all(pkgutil.resolve_name(name) is not None for name in new)


# --- the generated reference ----------------------------------------------------------------------


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the extension that writes the reference pages."""
    monkeypatch.syspath_prepend(str(DOCS / "_ext"))
    monkeypatch.delitem(sys.modules, "generated_reference", raising=False)
    return __import__("generated_reference")


def test_every_public_name_has_a_page(reference: ModuleType) -> None:
    import gpipe_jax
    import nas

    for package in (gpipe_jax, nas):
        pages = reference.api_pages(package)
        overview = pages.pop(f"{package.__name__}.rst")
        assert len(pages) == len(package.__all__)
        assert all(f":doc:`{name} <" in overview for name in package.__all__)
        assert len({page.lower() for page in pages}) == len(pages)


def test_every_option_and_every_setting_is_listed(reference: ModuleType) -> None:
    commands = "\n".join(reference.cli_page())
    for program, parser in PARSERS.items():
        (choices,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
        for name, command in choices.items():
            assert f"{program} {name}\n~" in commands
            for action in command._actions:
                if action.help != "==SUPPRESS==" and "--help" not in action.option_strings:
                    assert all(option in commands for option in action.option_strings)
    settings = "\n".join(reference.config_page())
    for root in (Config, SearchConfig):
        for section in root.model_fields:
            for kind, model in section_models(section, typing.cast(Any, root)).items():
                assert not kind or f"{section}.kind: {kind}\n^" in settings
                for field, info in model.model_fields.items():
                    assert field == "kind" or f"``{field}``" in settings
                    assert field == "kind" or info.description, f"{section}.{field}"
