"""The charts: what formats lose against what they take, and how speed grows. Points and lines
carry their names, so that no legend has to be matched with colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvant.figure import COLOURS, MARKERS, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

__all__ = ["GRID", "INK", "SOFT", "Point", "front", "growth_chart", "loss_chart"]

# The colours of text and lines; pages replace them by those of their theme.
INK, SOFT, GRID = "#1a1e24", "#56606c", "#e4e7eb"

_FRONT, _BEHIND, _LIMIT = COLOURS[0], COLOURS[4], COLOURS[1]

_NEAR = 13  # points: a name that is further from its point is joined to it
_LEADER = {"arrowstyle": "-", "color": _BEHIND, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5}

# Where a label may stand relative to its point, in points; the first free place is taken.
_PLACES = tuple(
    (dx, dy)
    for far in (1, 2, 3)
    for dx, dy in (
        (8 * far, 0), (7 * far, 10 * far), (7 * far, -10 * far), (0, 13 * far), (0, -13 * far),
        (-7 * far, 10 * far), (-7 * far, -10 * far), (-8 * far, 0),
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """A format: its size, what is measured, and half of the error bar."""

    label: str
    size: float
    value: float
    error: float | None = None


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of points (size, loss) that no other one is below in both (Pareto's front), by
    size."""
    ranked = sorted(range(len(points)), key=lambda index: points[index])
    chosen: list[int] = []
    for index in ranked:
        if not chosen or points[index][1] < points[chosen[-1]][1]:
            chosen.append(index)
    return chosen


def loss_chart(
    figure: Figure,
    points: Sequence[Point],
    *,
    xlabel: str,
    ylabel: str,
    limit: tuple[float, str],
    log: bool,
) -> None:
    """Draw points over their sizes, those of the front joined and in colour.

    Args:
        figure: an empty one.
        points: to draw; less is better with ``log``, more without.
        xlabel: what sizes are in.
        ylabel: what is measured.
        limit: a value to draw as a line, and what it is.
        log: draw the values on a logarithmic scale.
    """
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes = figure.add_subplot()
    best = [points[i] for i in front([(p.size, p.value if log else -p.value) for p in points])]
    axes.axhline(limit[0], color=_LIMIT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    corners = [(after.size, before.value) for before, after in pairwise(best)]
    steps = [(p.size, p.value) for p in best]
    for number, corner in enumerate(corners):
        steps.insert(2 * number + 1, corner)
    axes.plot(*zip(*steps, strict=True), color=_FRONT, linewidth=1.6, alpha=0.45, zorder=2)
    for point in points:
        colour = _FRONT if point in best else _BEHIND
        if point.error is not None:
            axes.errorbar(
                point.size, point.value, point.error, color=colour, capsize=3, linewidth=1, zorder=2
            )
        axes.plot(
            point.size,
            point.value,
            "o",
            color=colour,
            markersize=8 if point in best else 6,
            zorder=3,
        )
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.14, y=0.14)
    axes.set_xlabel(xlabel)
    tidy(axes, ylabel)
    axes.title.set_fontsize(10)
    figure.draw_without_rendering()  # places the axes, which labels are measured against
    said = axes.annotate(
        limit[1],
        (1, limit[0]),
        (-2, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=_LIMIT,
    )
    _label(
        axes,
        [*best, *(point for point in points if point not in best)],
        best,
        [said.get_window_extent()],
    )


def _plain(value: float) -> str:
    """A power of ten without an exponent."""
    return f"{value:.9f}".rstrip("0").rstrip(".") if value < 1 else f"{value:g}"


def _label(axes: Axes, points: Sequence[Point], best: Sequence[Point], taken: list[Bbox]) -> None:
    """Name each point at the place where least is in the way: points, error bars and other names
    may not be, lines rather not. A point without such a place has no name: tables have it."""
    things = [
        (point.size, point.value + share * (point.error or 0))
        for point in points
        for share in np.linspace(-1, 1, 41 if point.error else 1)
    ]
    dots = axes.transData.transform(things)
    lines = np.concatenate([_along(line) for line in axes.lines])
    for point in points:
        ways: list[tuple[int, tuple[int, int], Bbox]] = []
        for dx, dy in _PLACES:
            label = _annotate(axes, point, (dx, dy), strong=point in best)
            bare = label.get_window_extent()
            box = bare.padded(3)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            inside = inside and axes.bbox.containsy(box.y0) and axes.bbox.containsy(box.y1)
            free = inside and not box.count_overlaps(taken) and not box.count_contains(dots)
            label.remove()
            if free:
                ways.append((box.count_contains(lines), (dx, dy), bare))
        if ways:
            _, place, box = min(ways, key=lambda way: way[0])
            far = max(map(abs, place)) > _NEAR
            _annotate(axes, point, place, strong=point in best, leader=_LEADER if far else None)
            taken.append(box)


def _annotate(
    axes: Axes,
    point: Point,
    place: tuple[int, int],
    *,
    strong: bool,
    leader: dict[str, Any] | None = None,
) -> Annotation:
    return axes.annotate(
        point.label,
        (point.size, point.value),
        place,
        textcoords="offset points",
        ha="left" if place[0] > 0 else "right" if place[0] < 0 else "center",
        va="center_baseline",
        arrowprops=leader,
        fontsize=9.5 if strong else 9,
        fontweight="bold" if strong else "normal",
        color=INK if strong else SOFT,
    )


def _along(line: Line2D) -> NDArray[np.float64]:
    """Places ``[n, 2]`` in pixels along a line, some pixels from each other."""
    ends: NDArray[np.float64] = line.get_transform().transform(line.get_xydata())
    steps = np.linspace(0, 1, 200)[:, None, None]
    places: NDArray[np.float64] = ends[:-1] + steps * (ends[1:] - ends[:-1])
    return places.reshape(-1, 2)


def growth_chart(
    figure: Figure,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    xlabel: str,
) -> None:
    """Draw a line for each name over a logarithmic axis, from zero, the names at the ends.

    Args:
        figure: an empty one.
        lines: the points of each line, by the name of a format.
        title: what is measured, and its unit.
        xlabel: what grows.
    """
    from matplotlib.ticker import FuncFormatter

    axes = figure.add_subplot()
    for number, (name, points) in enumerate(lines.items()):
        axes.plot(
            *zip(*points, strict=True),
            marker=MARKERS[number % len(MARKERS)],
            color=COLOURS[number % len(COLOURS)],
            markersize=5,
            linewidth=1.8,
            label=name,
        )
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.set_xlim(right=ticks[-1] * (ticks[-1] / ticks[0]) ** 0.28)
    axes.set_xlabel(xlabel)
    tidy(axes, title)
    axes.title.set_fontsize(10)
    figure.draw_without_rendering()
    _label_ends(axes, lines)


def _label_ends(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Name lines at their right ends, moved apart where they would overlap."""
    least = 13 * axes.figure.dpi / 72  # pixels between two names
    ends = sorted(
        (axes.transData.transform(points[-1])[1], points[-1], number, name)
        for number, (name, points) in enumerate(lines.items())
    )
    tops: list[float] = []
    for place, *_ in ends:
        tops.append(max(place, tops[-1] + least) if tops else place)
    above = max(0.0, tops[-1] - axes.bbox.y1)
    for top, (place, point, number, name) in zip(tops, ends, strict=True):
        axes.annotate(
            name,
            point,
            (8, (top - above - place) * 72 / axes.figure.dpi),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=COLOURS[number % len(COLOURS)],
        )
