"""Run the command line: `python -m gpipe_jax train CONFIG` is `gpipe train CONFIG`.

Nothing that takes long is imported before the signals of a run are handled.
"""

import sys

RUNS = ("train", "eval")  # commands that a supervisor starts again after they were preempted


def main() -> int:
    """Run one command and return its exit code."""
    if sys.argv[1:2] and sys.argv[1] in RUNS:
        from gpipe_jax.distributed.preemption import run_program

        return run_program(_command)
    return _command()


def _command() -> int:
    from gpipe_jax.cli.main import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
