"""The charts of a report: gains, metrics over time, latency, layers, the tuner's waterfall, runs against each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_accel.pages.drawing import Box, Dot, Drawing, Label, Line, Mark, Scale, number, short

_ROW, _WIDE, _NAMES, _VALUES = 26, 840, 240, 150


class Gain(NamedTuple):
    """One gain with its interval; `value` is `None` where it is withheld."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None


def bars(labels: Sequence[str], panels: Mapping[str, Sequence[float]], *, title: str) -> Drawing:
    """Draw one horizontal bar per label in each panel; each panel has its own scale, from zero.

    Args:
        labels: What the rows are.
        panels: Values by the panel's heading, one per label. Negative ones and those that are no finite
            numbers are drawn as nothing, with what they are.
        title: Heading of the whole.

    >>> sum(isinstance(mark, Box) for mark in bars(["a", "b"], {"time": [0.5, 1]}, title="Saved").marks)
    2
    """
    wide, gap, top = 200, 80, 30
    marks: list[Mark] = []
    for row, label in enumerate(labels):
        text = short(label, 36)
        marks.append(Label(0, _middle(top, row), text, tip=label))
    for column, (heading, values) in enumerate(panels.items()):
        left, role = _NAMES + column * (wide + gap), f"series-{column % 6}"
        marks.append(Label(left, 16, heading, role, is_strong=True))
        scale = max([v for v in values if math.isfinite(v)] + [0.0]) or 1.0
        for row, value in enumerate(values):
            length = wide * max(value, 0.0) / scale if math.isfinite(value) else 0.0
            marks.append(Box(left, top + _ROW * row + 5, length, _ROW - 10, role))
            marks.append(Label(left + length + 6, _middle(top, row), number(value)))
    width = _NAMES + len(panels) * (wide + gap)
    return Drawing(title, width, top + _ROW * len(labels) + 10, marks)


def gains(rows: Sequence[Gain], *, title: str = "Gains") -> Drawing:
    """Draw gains around 1x on a logarithmic scale, with their intervals; a loss goes to the left.

    >>> drawing = gains([Gain("MACs", 4.0), Gain("latency", 0.5, 0.4, 0.6), Gain("steps/s", None, 0.5, 9)])
    >>> [mark.text for mark in drawing.marks if isinstance(mark, Label) and mark.is_strong]
    ['4.00x', '0.50x', 'withheld']
    """
    known = [v for row in rows for v in row[1:] if v is not None and 0 < v < math.inf]
    reach = min(max([2.2, *known, *(1 / v for v in known)]), 64)
    least = min([1 / 1.6, *(max(v / 1.1, 1 / reach) for v in known)])
    x = Scale(least, reach * 1.05, _NAMES, _WIDE - _VALUES, is_log=True)
    marks = _grid_x(_powers_of_two(least, reach * 1.05), x, len(rows), "x")
    one = x(1.0)
    marks.append(Line(((one, 22), (one, 30 + _ROW * len(rows))), "axis"))
    for row, gain in enumerate(rows):
        y = 30 + _ROW * row + _ROW / 2
        marks.append(_name(gain.name, y))
        role = "worse" if gain.value is not None and gain.value < 0.95 else "final"
        if gain.value is not None and gain.value > 0:
            end = _held(x, gain.value)
            marks.append(Box(min(one, end), y - 6, abs(end - one), 12, role, _told(gain)))
        if gain.low is not None and gain.high is not None and gain.low > 0:
            low, high = _held(x, gain.low), _held(x, gain.high)
            ink = "ink" if gain.value is not None else "axis"
            marks += [Line(((low, y), (high, y)), ink, _told(gain))]
            marks += [Line(((end, y - 4), (end, y + 4)), ink) for end in (low, high)]
        text = "withheld" if gain.value is None else f"{gain.value:.2f}x"
        role = "soft" if gain.value is None else role if role == "worse" else "ink"
        marks.append(Label(_WIDE - _VALUES + 16, y + 4, text, role, is_strong=True))
        if role == "worse":
            marks.append(
                Label(_WIDE - 62, y + 4, "slower" if _is_time(gain.name) else "more", role)
            )
    return Drawing(title, _WIDE, 34 + _ROW * len(rows), marks, _summary(rows))


def history(
    series: Mapping[str, Sequence[Sequence[Any]]], edits: Sequence[float] = (), *, title: str
) -> Drawing:
    """Draw metrics over epochs, with a line where the network was edited.

    Args:
        series: Points (epoch, value) by name; what is no number is a gap.
        edits: Epochs before which the network was changed.
        title: What is drawn.

    >>> drawing = history({"val/acc": [[1, 0.5], [2, None], [3, 0.9]]}, [2], title="acc")
    >>> [mark.role for mark in drawing.marks if isinstance(mark, Line) and mark.role == "edit"]
    ['edit']
    """
    wide, high, left, top, bottom, right = 460, 220, 56, 14, 34, 16
    known = [(float(e), float(v)) for points in series.values() for e, v in points if _is_real(v)]
    if not known:
        text = Label(wide / 2, high / 2, "no finite value", "soft", "middle")
        return Drawing(title, wide, high, [text])
    epochs, values = [e for e, _ in known] + list(edits), [v for _, v in known]
    spread = max(values) / min(values) if min(values) > 0 else 1.0
    is_log = spread > 50 and "loss" in title
    x = Scale(min(epochs), max(epochs), left, wide - right)
    y = Scale(min(values), max(values), high - bottom - 6, top + 8, is_log=is_log)
    marks: list[Mark] = []
    for value in y.ticks(4):
        marks.append(Line(((left, y(value)), (wide - right, y(value))), "grid"))
        marks.append(Label(left - 8, y(value) + 4, number(value), "soft", "end"))
    for epoch in x.ticks(6):
        if epoch == int(epoch):
            marks.append(Label(x(epoch), high - 16, f"{epoch:g}", "soft", "middle"))
    marks.append(Line(((left, high - bottom), (wide - right, high - bottom)), "axis"))
    marks.append(Label(wide - right, high - 2, "epochs done", "soft", "end"))
    marks += [Label(left, high - 2, "logarithmic", "soft")] if is_log else []
    for epoch in edits:
        tip = f"edited after epoch {epoch:g}"
        marks.append(Line(((x(epoch), top), (x(epoch), high - bottom)), "edit", tip))
    for index, (name, points) in enumerate(series.items()):
        marks += _curve(name, points, x, y, f"series-{index % 6}")
    last = ", ".join(f"{n} ends at {number(p[-1][1])}" for n, p in series.items() if _ends(p))
    return Drawing(title, wide, high, marks, last)


def latencies(spread: Mapping[str, Mapping[str, Any]], *, title: str = "Latency") -> Drawing:
    """Draw the tenth to ninetieth percentile of each measured call, and its median, dense above final.

    >>> side = {"p10_ms": 1.0, "median_ms": 2.0, "p90_ms": 4.0}
    >>> drawing = latencies({"latency_1": {"dense": side, "final": side}})
    >>> sum(isinstance(mark, Dot) for mark in drawing.marks)
    2
    """
    rows = [
        (name, which, found)
        for name, sides in sorted(spread.items(), key=lambda item: _by_size(item[0]))
        for which in ("dense", "final")
        if (found := _percentiles(sides.get(which)))
    ]
    known = [v for _, _, (p10, median, p90) in rows for v in (p10, median, p90)]
    if not known:
        return Drawing(title, _WIDE, 0)
    low, high = min(known) / 1.15, max(known) * 1.15
    x = Scale(low, high, _NAMES, _WIDE - _VALUES, is_log=True)
    marks = _grid_x(x.ticks(6), x, len(rows), " ms")
    for row, (name, which, (p10, median, p90)) in enumerate(rows):
        y = 30 + _ROW * row + _ROW / 2
        tip = f"{which}: median {number(median)} ms, 10 % below {number(p10)}, 90 % below {number(p90)}"
        marks.append(_name(f"{_spelled(name)}, {which}", y))
        is_dense = which == "dense"
        role = "dense" if is_dense else "band"
        marks.append(Box(x(p10), y - 5, max(x(p90) - x(p10), 1.5), 10, role, tip, is_dense))
        marks.append(Dot(x(median), y, 4, which, tip, is_dense))
        marks.append(Label(_WIDE - _VALUES + 16, y + 4, f"{number(median)} ms", tip=tip))
    return Drawing(title, _WIDE, 34 + _ROW * len(rows), marks)


def layers(rows: Sequence[Mapping[str, Any]], *, title: str = "Width of each layer") -> Drawing:
    """Draw each layer's width, the outline as it was and filled as it is.

    >>> drawing = layers([{"layer": "fc", "kind": "Linear", "before": 8, "after": 4}])
    >>> [mark.width for mark in drawing.marks if isinstance(mark, Box)]
    [450.0, 225.0]
    """
    size = 20 if len(rows) <= 60 else 17
    widest = max([max(row["before"], row["after"]) for row in rows] + [1])
    x = Scale(0, widest, _NAMES, _WIDE - _VALUES)
    marks: list[Mark] = []
    for row, found in enumerate(rows):
        before, after, y = found["before"], found["after"], size * row + 4
        kind = f" ({found['kind']})" if found.get("kind") else ""
        tip = f"{found['layer']}{kind}: {before} -> {after}"
        middle = y + size / 2
        marks.append(_name(found["layer"], middle, tip))
        marks.append(Box(_NAMES, y + 3, x(before) - _NAMES, size - 6, "dense", tip, True))
        marks.append(Box(_NAMES, y + 3, x(after) - _NAMES, size - 6, "final", tip))
        told = f"{before}" if before == after else f"{before} → {after or 'gone'}"
        role = "soft" if before == after else "ink"
        marks.append(Label(_WIDE - _VALUES + 16, middle + 4, told, role))
    num = sum(row["before"] != row["after"] for row in rows)
    return Drawing(title, _WIDE, size * len(rows) + 10, marks, f"{num} of {len(rows)} changed")


def waterfall(
    steps: Sequence[Mapping[str, Any]], *, title: str = "Milliseconds per step"
) -> Drawing:
    """Draw the tuner's way from plain to what it chose: how each step shortens the time.

    >>> steps = [{"label": "plain", "step_ms": 8.0, "ratio": 1.0}, {"label": "+ bf16", "step_ms": 4.0, "ratio": 2.0}]
    >>> [mark.width for mark in waterfall(steps).marks if isinstance(mark, Box)]
    [450.0, 225.0, 225.0]
    """
    longest = max([step["step_ms"] for step in steps] + [1e-9])
    x = Scale(0, longest, _NAMES, _WIDE - _VALUES)
    marks = _grid_x(x.ticks(5), x, len(steps), " ms")
    for row, step in enumerate(steps):
        y = 30 + _ROW * row + _ROW / 2
        marks.append(_name(step["label"], y))
        now, role = x(step["step_ms"]), "final" if row else "dense"
        marks.append(Box(_NAMES, y - 7, now - _NAMES, 14, role, f"{number(step['step_ms'])} ms"))
        if row:
            before = x(steps[row - 1]["step_ms"])
            saved = "band" if before >= now else "worse"
            marks.append(Box(min(now, before), y - 7, abs(before - now), 14, saved))
        told = f"{number(step['step_ms'])} ms, {step['ratio']:.2f}x"
        marks.append(Label(_WIDE - _VALUES + 16, y + 4, told))
    return Drawing(title, _WIDE, 34 + _ROW * len(steps), marks)


class Point(NamedTuple):
    """One run on the map of runs."""

    name: str
    x: float
    y: float
    link: str = ""
    is_on_front: bool = False


def scatter(points: Sequence[Point], *, x_name: str, y_name: str, title: str) -> Drawing:
    """Draw runs by two of their numbers, with a line along those that no other beats in both.

    >>> drawing = scatter([Point("a", 1, 2, "#a", True), Point("b", 2, 1)], x_name="ms", y_name="acc", title="")
    >>> [mark.link for mark in drawing.marks if isinstance(mark, Dot)]
    ['', '#a']
    """
    wide, high, left, top, bottom, right = 900, 400, 70, 16, 48, 24
    xs, ys = [p.x for p in points], [p.y for p in points]
    x = Scale(*_padded(xs), left, wide - right)
    y = Scale(*_padded(ys), high - bottom, top)
    marks: list[Mark] = []
    for value in y.ticks(5):
        marks.append(Line(((left, y(value)), (wide - right, y(value))), "grid"))
        marks.append(Label(left - 8, y(value) + 4, number(value), "soft", "end"))
    for value in x.ticks(7):
        marks.append(Line(((x(value), top), (x(value), high - bottom)), "grid"))
        marks.append(Label(x(value), high - bottom + 18, number(value), "soft", "middle"))
    marks.append(Label(left, top - 4, y_name, "soft"))
    marks.append(Label(wide - right, high - 8, x_name, "soft", "end"))
    front = sorted((p.x, p.y) for p in points if p.is_on_front)
    if len(front) > 1:
        marks.append(Line(tuple((x(a), y(b)) for a, b in front), "front"))
    for point in sorted(points, key=lambda p: p.is_on_front):
        tip = f"{point.name}: {x_name} {number(point.x)}, {y_name} {number(point.y)}"
        role = "final" if point.is_on_front else "dense"
        hollow = not point.is_on_front
        marks.append(Dot(x(point.x), y(point.y), 6, role, tip, hollow, point.link))
    on_front = ", ".join(p.name for p in points if p.is_on_front)
    return Drawing(title, wide, high, marks, f"best: {on_front}")


def _curve(name: str, points: Sequence[Any], x: Scale, y: Scale, role: str) -> list[Mark]:
    """Return the pieces between gaps, and a dot where a piece is one point."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for epoch, value in points:
        if _is_real(value):
            pieces[-1].append((x(float(epoch)), y(float(value))))
        elif pieces[-1]:
            pieces.append([])
    found = [piece for piece in pieces if piece]
    marks: list[Mark] = [Line(tuple(piece), role, name) for piece in found if len(piece) > 1]
    few = len(points) <= 40
    for epoch, value in points if few else ():
        if _is_real(value):
            tip = f"{name}: {number(float(value))} after epoch {epoch:g}"
            marks.append(Dot(x(float(epoch)), y(float(value)), 2.6, role, tip))
    lone = [] if few else [piece[0] for piece in found if len(piece) == 1]
    return marks + [Dot(*place, 2.2, role, name) for place in lone]


def _grid_x(ticks: Sequence[float], x: Scale, rows: int, unit: str) -> list[Mark]:
    marks: list[Mark] = []
    for value in ticks:
        marks.append(Line(((x(value), 22), (x(value), 30 + _ROW * rows)), "grid"))
        marks.append(Label(x(value), 14, f"{number(value)}{unit}", "soft", "middle"))
    return marks


def _powers_of_two(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    return [2.0**power for power in range(first, last + 1)]


def _name(name: str, y: float, tip: str = "") -> Label:
    return Label(0, y + 4, short(name, 34), "ink", "start", tip or name)


def _middle(top: float, row: int) -> float:
    return top + _ROW * row + _ROW / 2 + 4


def _held(x: Scale, value: float) -> float:
    return x(min(max(value, x.low), x.high))


def _told(gain: Gain) -> str:
    between = "" if gain.low is None else f", between {gain.low:.2f}x and {gain.high:.2f}x"
    return f"{gain.name}: {'withheld' if gain.value is None else f'{gain.value:.2f}x'}{between}"


def _summary(rows: Sequence[Gain]) -> str:
    return "; ".join(_told(row) for row in rows)


def _is_time(name: str) -> bool:
    return "latency" in name or "step" in name


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _ends(points: Sequence[Any]) -> bool:
    return bool(points) and _is_real(points[-1][1])


def _percentiles(side: Any) -> tuple[float, float, float] | None:
    """Read one side; older reports have no ninetieth percentile, and end at the median."""
    if not isinstance(side, Mapping):
        return None
    p10, median, p90 = (side.get(f"{name}_ms") for name in ("p10", "median", "p90"))
    if not (_is_real(p10) and _is_real(median)) or float(p10 or 0) <= 0:
        return None
    last = p90 if _is_real(p90) else median
    return float(p10 or 0), float(median or 0), float(last or 0)


def _by_size(name: str) -> tuple[bool, int, str]:
    """Sort batch 1 before batch 64, and both before a training step."""
    size = name.rpartition("_")[2]
    return (not size.isdigit(), int(size) if size.isdigit() else 0, name)


def _spelled(name: str) -> str:
    kind, _, batch = name.partition("_")
    return f"batch {batch}" if kind == "latency" else name.replace("_", " ")


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * 0.08 or abs(low) * 0.1 or 1.0
    return low - pad, high + pad
