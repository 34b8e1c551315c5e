"""The picture of an evaluation: what a format costs against what it saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvant.figure import COLOURS, MARKERS, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

    from kvant.eval.fidelity import FidelityRow

__all__ = ["plot"]

# Where a label may stand relative to its point, in points; the first free place is taken.
_PLACES = (
    (8, 0), (8, -13), (8, 13), (-8, 0), (-8, -13), (-8, 13), (0, 13), (0, -13), (8, -26), (8, 26)
)  # fmt: skip


def plot(rows: Sequence[FidelityRow], path: Path, *, model: str) -> None:
    """Write a picture of mean KL divergence (log scale) against bits per element: a point for
    each format, a marker for each context length. Formats without any divergence are left out,
    the baseline among them."""
    figure = new_figure(7, 4.2)
    axes = figure.add_subplot()
    shown = [row for row in rows if row.kld is not None and row.kld > 0]
    contexts = list(dict.fromkeys(row.ctx for row in rows))
    for index, ctx in enumerate(contexts):
        points = [row for row in shown if row.ctx == ctx]
        axes.plot(
            [row.bits_per_element for row in points],
            [row.kld or 0 for row in points],
            MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            markersize=7,
            markeredgecolor="white",
            markeredgewidth=0.8,
            label=f"{ctx} tokens",
        )
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("bits per KV element, metadata included")
    axes.set_ylabel(f"mean KL divergence from {rows[0].label}, nats")
    tidy(axes, f"{model}: fidelity of KV cache formats")
    if len(contexts) > 1:
        axes.legend(frameon=False, title="context", alignment="left")
    figure.draw_without_rendering()  # places the axes, which labels are measured against
    if shown:
        _label(axes, shown)
    figure.savefig(path)


def _label(axes: Axes, rows: Sequence[FidelityRow]) -> None:
    """Name each format at its worst point, where no other label and no point is."""
    worst: dict[str, FidelityRow] = {}
    for row in sorted(rows, key=lambda row: row.kld or 0):
        worst[row.label] = row
    dots = axes.transData.transform([(row.bits_per_element, row.kld or 0) for row in rows])
    taken: list[Annotation] = []
    for row in worst.values():
        for dx, dy in _PLACES:
            label = axes.annotate(
                row.label,
                (row.bits_per_element, row.kld or 0),
                (dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center_baseline",
                fontsize=9,
            )
            box = label.get_window_extent().padded(2)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
            others = [other.get_window_extent() for other in taken]
            if inside and not box.count_overlaps(others) and not box.count_contains(dots):
                break
            label.remove()
        else:
            label = axes.annotate(row.label, (row.bits_per_element, row.kld or 0), fontsize=9)
        taken.append(label)
