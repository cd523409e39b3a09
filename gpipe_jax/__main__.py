"""Run the command line: `python -m gpipe_jax train CONFIG` is `gpipe train CONFIG`."""

import sys

from gpipe_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
