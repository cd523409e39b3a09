"""Create and save figures of matplotlib, an optional dependency."""

import io
from pathlib import Path
from typing import Any

from gpipe_jax.utils import paths
from gpipe_jax.utils.text import install_advice


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of this size in inches, which notebooks show as a cell's value.

    It does not belong to pyplot, so a notebook keeps its own settings, and shows nothing twice.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"pictures need matplotlib: {install_advice('examples')}") from error

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            return to_png(self)

    return NotebookFigure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: str | Path | None, dpi: int = 120) -> Any:
    """Write a figure to `path` if given, and return it."""
    if path is not None:
        # Without a format matplotlib would add a suffix to a name that has none.
        file = paths.local("path", path)
        figure.savefig(file, dpi=dpi, format=file.suffix[1:] or "png")
    return figure


def to_png(figure: Any) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()
