"""Run `gpipe export`: write the parameters of a run as one plain file."""

import argparse

from gpipe_jax.utils import console, paths
from gpipe_jax.utils.messages import answer, fail, write
from gpipe_jax.utils.text import figures_table


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the command."""
    text = "write a run's parameters as one plain file"
    command = console.add_command(commands, "export", run, text)
    console.complete_files(command.add_argument("run", metavar="RUN", help="the folder of a run"))
    command.add_argument(
        "--out",
        type=console.path,
        required=True,
        metavar="FILE",
        help="ends in .safetensors or .npz",
    )


def run(options: argparse.Namespace) -> int:
    """Write a run's parameters as one plain file."""
    # This imports JAX, which the other commands do not need.
    from gpipe_jax.checkpoint.export import export

    try:
        with console.option("RUN"):
            folder = paths.anywhere("run", options.run)
        with console.option("--out"):
            figures = export(folder, options.out)
    except OSError as error:  # of the checkpoints' disk
        return fail(error, 1)
    write(figures_table(figures))
    answer(figures)
    return 0
