"""An empty matplotlib figure, an optional extra."""

import io
from pathlib import Path
from typing import Any


def blank(width: float, height: float) -> Any:
    """An empty figure, in inches, that notebooks show as the value of a cell.

    Not of pyplot's, so a notebook keeps its own settings, and nothing is shown twice.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: run pip install 'gpipe-jax[examples]'"
        ) from error

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            return png(self)

    return Shown(figsize=(width, height), layout="constrained")


def saved(figure: Any, path: str | Path | None, dpi: int = 120) -> Any:
    """The figure, written to `path` where given."""
    if path is not None:
        # Without a format matplotlib would add a suffix to a name that has none.
        figure.savefig(path, dpi=dpi, format=Path(path).suffix[1:] or "png")
    return figure


def png(figure: Any) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
