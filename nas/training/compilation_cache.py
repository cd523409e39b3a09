"""Set up JAX's own cache of compiled programs on disk, so that later runs need not compile."""

import os
import threading
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from gpipe_jax.utils import paths
from gpipe_jax.utils.xla_workarounds import jax_setting

_lock = threading.Lock()
_replaced: dict[str, str | None] = {}
"""The folder that this module set last, to the setting that it replaced."""


def use(folder: str | None = None) -> None:
    """Store compiled programs in a folder.

    Args:
        folder: The folder. Default: JAX's own setting, or else `default_folder()`.
    """
    with _lock:
        current = jax_setting("jax_compilation_cache_dir")
        users_own = _replaced.get(current, current)
        given = str(paths.local("compilation_cache", folder)) if folder else None
        new = given or users_own or str(default_folder())
        if new != current:
            jax.config.update("jax_compilation_cache_dir", new)
            _replaced.clear()
            _replaced[new] = users_own
            # If JAX compiled without a folder before, it has settled that there is no cache.
            compilation_cache.reset_cache()


def default_folder() -> Path:
    """Return the folder of this package in the user's folder of caches."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gpipe-jax" / "jax"
