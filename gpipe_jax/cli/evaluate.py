"""Run `gpipe eval`: evaluate the newest intact checkpoint of a run."""

import argparse
import json

from gpipe_jax.cli.train import add_process_options
from gpipe_jax.config import loader, trusted_code
from gpipe_jax.errors import ConfigError
from gpipe_jax.utils import console, paths
from gpipe_jax.utils.checks import check_count


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    text = "evaluate the newest checkpoint of a run"
    command = console.add_command(commands, "eval", run, text)
    console.add_config(command, f"the folder of a run (see --trust), or {console.CONFIG_RUNS_CODE}")
    command.add_argument("--stages", type=int, metavar="K", help="evaluate on other stages")
    command.add_argument("--trust", action="store_true", help=trusted_code.TRUST)
    add_process_options(command)


def run(options: argparse.Namespace) -> int:
    """Evaluate the newest intact checkpoint of a config's run, or of a run's folder."""
    # These import JAX, which the other commands do not need.
    from gpipe_jax.cli.run import run_action
    from gpipe_jax.run_folder.folder import CONFIG
    from gpipe_jax.training.run import evaluate

    with console.option("CONFIG"):
        folder = paths.anywhere("config", options.config)
    try:
        is_run = folder.is_dir()
        exists = is_run or folder.exists()
    except ImportError as error:
        raise ConfigError([loader.no_package(error)], options.config) from error
    if not exists and folder.suffix not in (".yaml", ".yml"):
        raise ConfigError([loader.no_run(options.config)], options.config)
    if is_run:
        if not (folder / CONFIG).exists():
            problem = f"the folder has no {CONFIG}; give the folder of a run, or a YAML file"
            raise ConfigError([f"{folder}: {problem}"], options.config)
        options.config = str(folder / CONFIG)
        options.overrides = [f"train.workdir={json.dumps(str(folder))}", *options.overrides]
        if not options.trust:
            trusted_code.check(loader.load(options.config, options.overrides), options.config)
    if options.stages is not None:
        with console.option("--stages"):
            check_count("stages", options.stages)
        stages = [f"mesh.stages={options.stages}", "pipeline.partition=auto"]
        options.overrides = [*stages, *options.overrides]
    # The packages of writers are not needed here.
    options.overrides = [*options.overrides, "train.writers=[]"]
    return run_action(options, evaluate)
