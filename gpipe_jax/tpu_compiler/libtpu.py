"""Which TPU compiler is installed, and whether it is the one that jax wants."""

import importlib.metadata
import re
from contextlib import suppress

from gpipe_jax.errors import CompilerNotInstalledError

INSTALL = "pip install 'gpipe-jax[tpu]'"


def versions() -> dict[str, str | None]:
    """jax, jaxlib, libtpu, and the libtpu that this jax asks for; None for what isn't there."""
    found: dict[str, str | None] = dict.fromkeys(("jax", "jaxlib", "libtpu"))
    for name in found:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    wanted = importlib.metadata.requires("jax") or []
    pins = [m[1] for r in wanted if (m := re.match(r"libtpu\s*==\s*([\w.*]+)", r))]
    return {**found, "libtpu_pinned": pins[0] if pins else None}


def check_installed() -> None:
    """NotInstalledError unless the TPU compiler is there."""
    if versions()["libtpu"] is None:
        raise CompilerNotInstalledError(
            f"compiling for a TPU needs its compiler, libtpu, which is not installed: {INSTALL} "
            f"(Linux x86-64; no TPU is needed)"
        )


def version_warning() -> str | None:
    """What to tell the user if libtpu is not the one that this jax was made for."""
    found = versions()
    installed, pinned = found["libtpu"], found["libtpu_pinned"]
    if installed is None or pinned is None:
        return None
    if f"{installed}.".startswith(pinned.removesuffix("*").rstrip(".") + "."):
        return None
    return (
        f"libtpu {installed} is installed, but jax {found['jax']} is made for libtpu {pinned}; "
        f"another one can fail to compile: {INSTALL}"
    )
