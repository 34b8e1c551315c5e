"""How kvant's pictures look, and whether one can be drawn here. matplotlib is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kvant.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "MARKERS", "check_plot", "need_matplotlib", "new_figure", "tidy"]

COLOURS = ("#1f6feb", "#d9730d", "#2da44e", "#8250df", "#57606a", "#bf3989", "#9a6700", "#0a7f8c")
MARKERS = "os^DvPX*"

_KINDS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raise ConfigError if a picture could not be written to this file for want of matplotlib or
    of a known kind of picture."""
    if path.suffix.lower() not in _KINDS:
        raise ConfigError(f"plot={str(path)!r} must end in {', '.join(_KINDS)}")
    need_matplotlib()


def need_matplotlib() -> None:
    """Raise ConfigError if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError('plots need matplotlib; run: pip install "kvant[eval]"') from None


def new_figure(width: float, height: float) -> Figure:
    """An empty picture of this size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def tidy(axes: Axes, title: str) -> None:
    """Title to the left, a light grid behind the data, no box."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(visible=True, color="#e4e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
