"""What is compiled, and what comes of it: memory, cycles and communication, or why it failed."""

import re
from typing import Any, NamedTuple

import jax.export

from gpipe_jax.tpu_compiler.hlo import Collective
from gpipe_jax.utils.text import format_bytes


class Program(NamedTuple):
    """Something to compile: what `jax.export.export(jitted, platforms=["tpu"])(*specs)` gives."""

    name: str
    exported: jax.export.Exported
    donate: tuple[int, ...] = ()  # which of the flattened arguments; an export forgets it
    mesh_shape: tuple[int, int] = (1, 1)  # stages, data replicas


class Compiled(NamedTuple):
    """What the compiler says of a program, per device; or why it can't be compiled."""

    name: str
    compile_s: float
    argument_bytes: int = 0
    output_bytes: int = 0
    alias_bytes: int = 0  # of outputs that take the place of donated arguments
    temporary_bytes: int = 0
    code_bytes: int = 0
    needed_bytes: int = 0  # arguments + outputs - aliased + temporaries + code
    cycles: float = 0.0
    collectives: tuple[Collective, ...] = ()
    endless_loops: int = 0  # whose length is not known: `cycles` has one round of each
    error: str | None = None
    usable_bytes: int | None = None  # only of a program that does not fit
    short_by_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """Whether it compiled, and its sizes add up to what a device has."""
        return self.error is None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "collectives": [c._asdict() for c in self.collectives]}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "Compiled":
        """The inverse of `to_dict`."""
        collectives = tuple(Collective(**c) for c in found["collectives"])
        return cls(**{**found, "collectives": collectives})


def too_large(result: Compiled, usable_bytes: int) -> Compiled:
    """The result of a program that needs more than a device has."""
    short = result.needed_bytes - usable_bytes
    error = f"does not fit by {format_bytes(short)}"
    return result._replace(error=error, usable_bytes=usable_bytes, short_by_bytes=short)


# Out of memory. The compiler has two ways to say it; the second also counts arguments.
_OUT_OF_MEMORY = (
    re.compile(r"Used ([\d.]+)([BKMGT]?) of ([\d.]+)([BKMGT]?) hbm"),
    re.compile(r"memory required for .*?\(([\d.]+)([BKMGT]?)\) exceeds .*?\(([\d.]+)([BKMGT]?)\)"),
)


def failed(name: str, compile_s: float, text: str) -> Compiled:
    """The result of a compilation that ended with this error."""
    for pattern in _OUT_OF_MEMORY:
        if match := pattern.search(text):
            need, usable = (
                round(float(match[i]) * 1024 ** "BKMGT".index(match[i + 1] or "B")) for i in (1, 3)
            )
            return too_large(Compiled(name, compile_s, needed_bytes=need), usable)
    lines = [line.strip() for line in text.splitlines()]
    return Compiled(name, compile_s, error=next((x for x in lines if x), "no message")[:500])
