"""Draw architectures of the store, and describe the differences between two.

Spaces that are a `nas.DrawableSpace` have pictures. Architectures of other spaces are shown as the
text that their space wrote. A space that is not given is found by its name, if it is a built-in
one.
"""

import html as escaping
from typing import Any, NamedTuple

from gpipe_jax.utils import graph_drawing
from gpipe_jax.utils.graph_drawing import Picture
from nas.spaces.space import DrawableSpace, Space, built_in


class StoredArchitecture(NamedTuple):
    """Hold an architecture's text, and its value if a space with pictures reads the text."""

    text: str
    space: DrawableSpace[Any] | None = None
    value: Any = None


def read(name: str, text: str, space: Space[Any] | None = None) -> StoredArchitecture:
    """Read a text that the space of this name has encoded; `space` is the space, if it is known."""
    reading = space if isinstance(space, DrawableSpace) else built_in(name)
    if not isinstance(reading, DrawableSpace):
        return StoredArchitecture(text)
    try:
        return StoredArchitecture(text, reading, reading.decode(text))
    except ValueError:  # a user's space of the same name
        return StoredArchitecture(text)


def pictures(
    architecture: StoredArchitecture, before: StoredArchitecture | None = None
) -> list[Picture]:
    """Draw the cells, with marks where they differ from `before`; empty without pictures."""
    if architecture.space is None:
        return []
    return architecture.space.pictures(architecture.value, before.value if before else None)


def differences(architecture: StoredArchitecture, before: StoredArchitecture) -> list[str]:
    """Describe each difference from `before` in a line; empty if they are equal."""
    if architecture.space is not None and before.space is not None:
        return architecture.space.differences(architecture.value, before.value)
    if architecture.text == before.text:
        return []
    return [f"{before.text} → {architecture.text}"]


def html(architecture: StoredArchitecture, before: StoredArchitecture | None = None) -> str:
    """Return the cells as inline SVG, or else the text."""
    drawn = pictures(architecture, before)
    if drawn:
        return graph_drawing.side_by_side(drawn)
    return f'<pre style="white-space:pre-wrap">{escaping.escape(architecture.text)}</pre>'
