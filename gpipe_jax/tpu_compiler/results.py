"""Hold programs to compile and their results: memory, cycles and collectives, or the error."""

import re
from typing import Any, NamedTuple

import jax.export

from gpipe_jax.tpu_compiler.hlo import Collective
from gpipe_jax.utils.text import format_bytes


class Program(NamedTuple):
    """Hold a program to compile: `jax.export.export(jitted, platforms=["tpu"])(*specs)`."""

    name: str
    exported: jax.export.Exported
    donate: tuple[int, ...] = ()  # indices of flattened arguments; an export does not keep them
    mesh_shape: tuple[int, int] = (1, 1)  # stages, data replicas


class Compiled(NamedTuple):
    """Hold what a compiled program needs, per device, or why it does not compile."""

    name: str
    compile_s: float
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0  # of outputs written over donated arguments
    temporary_bytes: int = 0
    code_bytes: int = 0
    needed_bytes: int = 0  # arguments + outputs - aliased + temporaries + code
    cycles: float = 0.0
    collectives: tuple[Collective, ...] = ()
    endless_loops: int = 0  # loops of unknown length: `cycles` counts one iteration of each
    error: str | None = None
    usable_bytes: int | None = None  # set only if the program does not fit
    short_by_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Return whether it compiled, and needs no more than a device has."""
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary for JSON."""
        return {**self._asdict(), "collectives": [c._asdict() for c in self.collectives]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Compiled":
        """Return the result of a dictionary by `to_dict`."""
        collectives = tuple(Collective(**c) for c in values["collectives"])
        return cls(**{**values, "collectives": collectives})


def too_large(result: Compiled, usable_bytes: int) -> Compiled:
    """Return the result of a program that needs more than a device has."""
    short = result.needed_bytes - usable_bytes
    error = f"does not fit by {format_bytes(short)}"
    return result._replace(error=error, usable_bytes=usable_bytes, short_by_bytes=short)


# The compiler has two messages for out of memory; the second also counts arguments.
_OUT_OF_MEMORY = (
    re.compile(r"Used ([\d.]+)([BKMGT]?) of ([\d.]+)([BKMGT]?) hbm"),
    re.compile(r"memory required for .*?\(([\d.]+)([BKMGT]?)\) exceeds .*?\(([\d.]+)([BKMGT]?)\)"),
)


def failed(name: str, compile_s: float, text: str) -> Compiled:
    """Return the result of a compilation that failed with the message `text`."""
    for pattern in _OUT_OF_MEMORY:
        if match := pattern.search(text):
            needed, usable = _bytes(match[1], match[2]), _bytes(match[3], match[4])
            return too_large(Compiled(name, compile_s, needed_bytes=needed), usable)
    first_line = next(iter(text.strip().splitlines()), "no message").strip()
    return Compiled(name, compile_s, error=first_line[:500])


def _bytes(number: str, unit: str) -> int:
    """Return the bytes of a size as the compiler writes it: "15.5" and "G"."""
    return round(float(number) * 1024 ** "BKMGT".index(unit or "B"))
