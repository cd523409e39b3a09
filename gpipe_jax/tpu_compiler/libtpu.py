"""Find the installed TPU compiler, and check that its version is the one that jax pins."""

import importlib.metadata
import re
from contextlib import suppress

from gpipe_jax.errors import CompilerNotInstalledError
from gpipe_jax.utils.text import install_advice

INSTALL = install_advice("tpu")


def versions() -> dict[str, str | None]:
    """Return the versions of jax, jaxlib and libtpu, and the libtpu that jax pins, or None."""
    installed: dict[str, str | None] = dict.fromkeys(("jax", "jaxlib", "libtpu"))
    for name in installed:
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    requirements = importlib.metadata.requires("jax") or []
    pins = [m[1] for r in requirements if (m := re.match(r"libtpu\s*==\s*([\w.*]+)", r))]
    return {**installed, "libtpu_pinned": pins[0] if pins else None}


def check_installed() -> None:
    """Raise CompilerNotInstalledError unless the TPU compiler is installed."""
    if versions()["libtpu"] is None:
        raise CompilerNotInstalledError(
            f"compiling for a TPU needs its compiler, libtpu, which is not installed: {INSTALL} "
            f"(Linux x86-64; no TPU is needed)"
        )


def version_warning() -> str | None:
    """Return a warning if libtpu is not the version that jax pins."""
    known = versions()
    installed, pinned = known["libtpu"], known["libtpu_pinned"]
    if installed is None or pinned is None:
        return None
    if f"{installed}.".startswith(pinned.removesuffix("*").rstrip(".") + "."):
        return None
    return (
        f"libtpu {installed} is installed, but jax {known['jax']} pins libtpu {pinned}; "
        f"another version can fail to compile: {INSTALL}"
    )
