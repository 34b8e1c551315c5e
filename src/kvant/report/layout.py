"""What a report is made of: sections of charts, tables and notes, for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvant.report.stored import Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MINUS",
    "NONE",
    "TIMES",
    "Cell",
    "Chart",
    "Section",
    "Table",
    "count",
    "counted",
    "decimals",
    "in_order",
    "signed",
    "sized",
    "times",
]


NONE, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
"""What stands for no figure, before negative ones, and for "times"."""


ACCURACY, SPEED, KERNELS, LENGTHS, MORE = range(5)
"""The places of sections on the page, first to last."""


@dataclass(frozen=True, slots=True)
class Cell:
    """``text``, smaller below it ``detail``, and ``tone``: "", "worse", "better", "faint" or
    "taken". ``share`` from 0 to 1 is drawn as the depth of the cell's colour."""

    text: str
    detail: str = ""
    tone: str = ""
    share: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of as many cells as ``head`` has words; the first of each names its row. The first
    ``words`` columns are text, the others figures."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    words: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture.

    name     of its file, without an ending
    title    what it shows; alt: what is to be seen in it, for those who cannot
    draw     draws it into an empty figure
    size     width and height in 1/72 inch, at which its text has 10 points; narrow: the same for
             telephones, None where ``size`` is as narrow
    """

    name: str
    title: str
    alt: str
    draw: Callable[[Figure], None]
    size: tuple[float, float]
    narrow: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A heading and what is below it. ``sources`` are the files that the figures are from;
    ``place`` orders sections, ``accuracy`` tells what belongs to a document about accuracy."""

    key: str
    title: str
    about: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    sources: Sequence[Source] = ()
    place: int = SPEED
    accuracy: bool = False


def in_order(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Each once, by date and name."""
    return tuple(sorted(dict.fromkeys(sources), key=lambda source: (source.date, source.name)))


def count(value: float) -> str:
    """``12,240``."""
    return f"{value:,.0f}"


def counted(number: int, thing: str) -> str:
    """``1 data set``, ``12 data sets``."""
    return f"{count(number)} {thing}{'' if number == 1 else 's'}"


def sized(value: float) -> str:
    """Bytes without decimals; less than 100 are bits, with two."""
    return count(value) if value >= 100 else f"{value:.2f}"


def decimals(value: float | None, pattern: str = "#.3g", unit: str = "") -> str:
    """A figure, a dash for none. Never as a power of ten: ``0.000016``."""
    if value is None:
        return NONE
    text = f"{value:{pattern}}".rstrip(".") if value else "0"
    if "e" in text:
        text = f"{float(text):,.0f}" if abs(value) >= 1 else f"{float(text):.9f}".rstrip("0")
    return text.replace("-", MINUS) + unit


def signed(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A difference with its sign, which zero has none of."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}"
    return (text[1:] if float(text) == 0 else text.replace("-", MINUS)) + unit


def times(value: float) -> str:
    """``1.9`` and a multiplication sign."""
    return f"{value:.2f} {TIMES}" if value < 10 else f"{value:.1f} {TIMES}"
