"""What the docs tell to launch is there: files, commands, options, extras; and devices add up."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from paths import REPOSITORY as ROOT

from gpipe_jax.cli import main as cli
from gpipe_jax.config import loader
from gpipe_jax.config.run import Config
from gpipe_jax.tpu_compiler import topologies
from gpipe_jax.training import from_config
from gpipe_jax.utils import console

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SPEC = yaml.safe_load((DOCS / "jobset.yaml").read_text())["spec"]
JOB = SPEC["replicatedJobs"][0]["template"]["spec"]
SKY = yaml.safe_load((DOCS / "skypilot.yaml").read_text())
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def trained(words: list[str]) -> Config:
    """The config that a training command names, if it is one."""
    assert words[1:4] == ["-m", "gpipe_jax", "train"]
    return loader.load(ROOT / words[4], words[5:])


def devices(config: Config) -> int:
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


@pytest.mark.parametrize("path", [*PAGES, *DOCS.glob("*.yaml"), *(ROOT / "scripts").glob("*.sh")])
def test_extras_and_links(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for extras in re.findall(r"\.\[([a-z,]+)\]|gpipe-jax\[([a-z,]+)\]", text):
        assert set("".join(extras).split(",")) <= set(EXTRAS)
    for target in re.findall(r"\]\((\w+\.\w+)\)|docs/(\w+\.(?:md|yaml))", text):
        assert (DOCS / "".join(target)).exists(), target


def test_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of data.md, as they stand."""
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "data.md").read_text()
    writing, making = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    sections = re.findall(r"```yaml\n(data: .*?)```", page, re.DOTALL)
    kinds = {one["data"]["kind"]: one["data"] for one in map(yaml.safe_load, sections)}
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


def commands(page: Path) -> list[list[str]]:
    """Every command of the blocks of shell lines."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


CASES: list[Any] = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), CASES, ids=lambda v: v if isinstance(v, str) else v[0])
def test_commands_of_the_pages(page: str, words: list[str]) -> None:
    if words[0].startswith("scripts/"):
        done = subprocess.run(
            [ROOT / words[0], *words[1:], "--dry-run"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        options = [word for word in words if "=" in word]
        assert all(option in done.stdout for option in options)
    elif words[0] == "gpipe":
        options = console.parse(cli._parser(), words[1:])
        config = loader.load(ROOT / options.config, options.overrides)
        if options.topology:
            topology = topologies.parse(options.topology)
            assert topology.devices == config.mesh.stages * config.mesh.data
    else:
        assert words[0] in ("gcloud", "docker", "kubectl", "sky", "pip"), f"{page}: {words}"
