"""`python -m gpipe_jax.train CONFIG [a.b=c ...]`: the same as `gpipe train`, on every host."""

import sys

from gpipe_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
