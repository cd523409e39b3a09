"""Fingerprint what a fitness or a proposal depends on: code, and the plain values that it uses.

    evaluate --> its source, defaults and closure
             --> functions, classes and values of your own modules that it reads, and what they read

Code of installed packages counts by its name and the values that it is bound to, such as those of
an optimizer; arrays count by type and shape. Left out are values that the code itself changes, such
as counters and lists of results, and absolute paths, which differ between machines.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from nas.fingerprints.source import Digests
from nas.fingerprints.walk import Walk


class Fingerprint(NamedTuple):
    """Hold the digests of all functions, and all values as texts or types, by name."""

    codes: dict[str, Digests]
    values: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as a JSON value."""
        codes = {name: list(each) for name, each in self.codes.items()}
        return {"codes": codes, "values": self.values}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fingerprint":
        """Read what `to_json` returned."""
        codes = {name: Digests(*each) for name, each in value["codes"].items()}
        return cls(codes, dict(value["values"]))

    def changes(self, now: "Fingerprint") -> list[str]:
        """Describe each difference between this fingerprint and a later one; none if it is alike.

        Only what both have is compared: whatever is read, is read by code that both have.
        """
        codes = [
            f"the code of {name} has changed"
            for name, each in self.codes.items()
            if name in now.codes and not each.agrees(now.codes[name])
        ]
        values = [
            f"{name} has changed from {text} to {now.values[name]}"
            for name, text in self.values.items()
            if now.values.get(name, text) != text
        ]
        return codes + values


def fingerprint(value: Any, name: str) -> Fingerprint:
    """Return the fingerprint of a function or an object, which is called `name`."""
    walk = Walk()
    walk.visit(name, value)
    return Fingerprint(walk.codes, walk.values)
