"""An empty matplotlib figure, an optional extra."""

from typing import Any


def blank(width: float, height: float) -> Any:
    """An empty figure, in inches. Not of pyplot's, so a notebook keeps its own settings."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: run pip install 'gpipe-jax[examples]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
