"""JAX's own cache of compiled programs, on disk, so that later runs need not compile."""

import os
import threading
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_lock = threading.Lock()
_told: dict[str, str | None] = {}  # by the folder that JAX was told last, the one before ours


def use(folder: str | None = None) -> None:
    """Keep programs there; by default where JAX is told to, or else in `default()`."""
    with _lock:
        current = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009  # not in its stubs
        own = _told.get(current, current)
        wanted = folder or own or str(default())
        if wanted != current:
            jax.config.update("jax_compilation_cache_dir", wanted)
            _told.clear()
            _told[wanted] = own
            # What was compiled before without a folder has settled that there is none.
            compilation_cache.reset_cache()


def default() -> Path:
    """In the user's folder of caches."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "gpipe-jax" / "jax"
