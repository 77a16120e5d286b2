"""A chart as plain shapes, each with a role that says its colour; as SVG with nothing to install, as PNG by matplotlib.

What is drawn is computed once, in pixels from the top left. Colours follow Okabe and Ito, so that people with any
kind of colour vision tell them apart; dense and final differ in form as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

LIGHT = {
    "paper": "#ffffff",
    "ink": "#1d2430",
    "soft": "#5b6675",
    "grid": "#e3e7ec",
    "axis": "#aab3bf",
    "dense": "#98a2b0",
    "final": "#0072b2",
    "worse": "#c44e00",
    "band": "#cfe3f1",
    "edit": "#a23b72",
    "front": "#0072b2",
    "series-0": "#0072b2",
    "series-1": "#c44e00",
    "series-2": "#00805e",
    "series-3": "#a23b72",
    "series-4": "#8a6d00",
    "series-5": "#3a9ad9",
}
DARK = {
    "paper": "#14181f",
    "ink": "#e8ecf1",
    "soft": "#a3adba",
    "grid": "#2a313b",
    "axis": "#5b6675",
    "dense": "#7f8a99",
    "final": "#56b4e9",
    "worse": "#f0904d",
    "band": "#1f3a4d",
    "edit": "#e29cc2",
    "front": "#56b4e9",
    "series-0": "#56b4e9",
    "series-1": "#f0904d",
    "series-2": "#3fc99f",
    "series-3": "#e29cc2",
    "series-4": "#e6c84b",
    "series-5": "#9ad0f5",
}
DASHES = {
    "edit": "3 3",
    "series-1": "6 3",
    "series-2": "2 2",
    "series-3": "8 3 2 3",
    "series-4": "10 3",
    "series-5": "3 2 8 2",
}
"""Lines that differ in form too."""


class Line(NamedTuple):
    """A path through points."""

    points: tuple[tuple[float, float], ...]
    role: str
    tip: str = ""


class Box(NamedTuple):
    """A rectangle; `is_hollow` draws its edge alone."""

    x: float
    y: float
    width: float
    height: float
    role: str
    tip: str = ""
    is_hollow: bool = False


class Dot(NamedTuple):
    """A point with a mark, and where it leads when it is clicked."""

    x: float
    y: float
    radius: float
    role: str
    tip: str = ""
    is_hollow: bool = False
    link: str = ""


class Label(NamedTuple):
    """A text; `anchor` is start, middle or end, as in SVG."""

    x: float
    y: float
    text: str
    role: str = "ink"
    anchor: str = "start"
    tip: str = ""
    is_strong: bool = False


Mark = Line | Box | Dot | Label


@dataclass(frozen=True)
class Drawing:
    """Shapes on a sheet. `title` and `summary` are for those who hear it.

    >>> Drawing("Saved", 100, 20, [Box(0, 0, 50, 20, "final")]).width
    100
    """

    title: str
    width: float
    height: float
    marks: Sequence[Mark] = field(default_factory=tuple)
    summary: str = ""

    @property
    def leads_on(self) -> bool:
        """Whether something in it can be clicked."""
        return any(isinstance(mark, Dot) and mark.link for mark in self.marks)

    def to_svg(self) -> str:
        """Return a file that stands by itself, in light and dark.

        >>> "a&lt;b" in Drawing("a<b", 10, 10).to_svg()
        True
        """
        from lightning_accel.pages.templates import environment

        template = environment().get_template("picture.svg.j2")
        colours = {"light": LIGHT, "dark": DARK, "dashes": DASHES}
        return template.render(drawing=self, **colours).strip() + "\n"


class Scale:
    """From values to pixels, linear or logarithmic, with round ticks.

    >>> scale = Scale(0, 10, 100, 200)
    >>> scale(5), scale.ticks(4)
    (150.0, [0.0, 2.5, 5.0, 7.5, 10.0])
    >>> Scale(0.5, 4, 0, 300, is_log=True)(1)
    100.0
    """

    def __init__(
        self, low: float, high: float, start: float, end: float, *, is_log: bool = False
    ) -> None:
        self.is_log = is_log and low > 0
        if high <= low:
            pad = abs(low) * 0.1 or 1.0
            low, high = (low / 1.2, low * 1.2) if self.is_log else (low - pad, low + pad)
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        low, high, value = (self._inner(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Return round values within, at most about so many."""
        return list(_powers(self.low, self.high, most) if self.is_log else self._steps(most))

    def _inner(self, value: float) -> float:
        return math.log2(max(value, 1e-300)) if self.is_log else value

    def _steps(self, most: int) -> Iterator[float]:
        raw = (self.high - self.low) / max(1, most)
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * (1 - 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        for index in range(first, last + 1):
            yield round(index * step, 12)


def _powers(low: float, high: float, most: int) -> Iterator[float]:
    """Yield 1, 2, 5, 10 ... where few, powers of ten where many."""
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades * 3 <= most + 1 else (1, 3) if decades * 2 <= most + 1 else (1,)
    every = max(1, round(decades / most))
    start = math.floor(math.log10(low))
    for power in range(start, math.ceil(math.log10(high)) + 1):
        for digit in digits if power % every == 0 else ():
            value = digit * 10.0**power
            if low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
                yield value


def short(text: str, most: int = 34) -> str:
    """Shorten a name: of a dotted one its longest words first, so that numbers of blocks stay; then in the middle.

    >>> short("encoder.blocks.11.attention.output.dense", 34), short("a" * 50, 9)
    ('encod….blocks.11.att….output.dense', 'aaaa…aaaa')
    """
    words = text.split(".")
    while len(".".join(words)) > most:
        place = max(range(len(words)), key=lambda i: len(words[i]))
        if len(words[place]) < 6:
            break
        over = len(".".join(words)) - most
        words[place] = f"{words[place][: max(3, len(words[place]) - over - 1)]}…"
    text = ".".join(words) if len(words) > 1 else text
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[len(text) - (most - 1 - half) :]}"


def number(value: float) -> str:
    """Write a number for an axis or beside a mark.

    >>> number(0.25), number(12345.0), number(1500000), number(2e-7)
    ('0.25', '12.3k', '1.5M', '2e-07')
    """
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            base = 1e3 if unit == "k" else size
            return f"{value / base:.3g}{unit}"
    return f"{value:.4g}" if abs(value) >= 1000 else f"{value:.3g}"
