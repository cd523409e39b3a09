"""Name the new command to users of the old one, `python -m gpipe_jax.train CONFIG`.

The exit code says: do not retry. Without this file it would be that of a missing module.
"""

import shlex
import sys

from gpipe_jax.utils.messages import BAD_INPUT, fail

if __name__ == "__main__":
    command = shlex.join(["python", "-m", "gpipe_jax", "train", *sys.argv[1:]])
    sys.exit(fail(f"use {command}", BAD_INPUT))
