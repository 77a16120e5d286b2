"""What seeds found about accuracy, variant and share of the arithmetic: as tables and as a picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from lightning_accel.measure import Table

Found = dict[tuple[str, float, str], list[float]]
"""Variant, share and moment ("cut", "tuned", "macs", ...) to one value per seed; "dense", 1.0 is the whole network."""
Moments = Mapping[str, str]
"""What is shown of them, and how it is called."""


def joined(seeds: Sequence[Found]) -> Found:
    found: Found = {}
    for one in seeds:
        for key, values in one.items():
            found.setdefault(key, []).extend(values)
    return found


def table(what: str, found: Found, moment: str, when: str) -> Table:
    """Show mean and standard error per variant and share."""
    dense = found.get(("dense", 1.0, moment)) or found["dense", 1.0, "cut"]
    title = f"{what}, {when} (dense: {_cell(dense)}, {len(dense)} seeds)"
    names = dict.fromkeys(name for name, _, at in found if at == moment and name != "dense")
    shares = _shares(found)
    rows = [
        [name, *(_cell(found.get((name, share, moment), [])) for share in shares)] for name in names
    ]
    return Table(["variant", *(f"{share:.0%} of the MACs" for share in shares)], rows, title)


def _shares(found: Found) -> list[float]:
    return sorted({share for _, share, _ in found if share < 1}, reverse=True)


def _cell(values: list[float]) -> str:
    if not values:
        return "fails"
    return f"{statistics.fmean(values):.2f} ± {_standard_error(values):.2f}"


def _standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


_COLOURS = (
    *("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7"),
    *("#a463f2", "#97bbf5", "#9c6b4e", "#9498a0", "#1f1f1f", "#c9366b"),
)
_PANEL, _MARGIN, _LEGEND = (420, 300), (60, 46), 240


def picture(tasks: Sequence[tuple[str, Found]], moments: Moments) -> str:
    """Draw a panel per task and moment as one SVG without any reference to the outside."""
    names = list(
        dict.fromkeys(
            n.removesuffix(", compensated")
            for _, found in tasks
            for n, _, _ in found
            if n != "dense"
        )
    )
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(names)}
    width = len(moments) * (_PANEL[0] + _MARGIN[0]) + _LEGEND
    height = len(tasks) * (_PANEL[1] + 2 * _MARGIN[1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12"><rect width="{width}" height="{height}" '
        f'fill="white"/>'
    ]
    for row, (what, found) in enumerate(tasks):
        for column, (moment, when) in enumerate(moments.items()):
            left = _MARGIN[0] + column * (_PANEL[0] + _MARGIN[0])
            top = _MARGIN[1] + row * (_PANEL[1] + 2 * _MARGIN[1])
            parts.append(f'<g transform="translate({left},{top})">')
            parts += _panel(f"{what}, {when}", found, moment, colours)
            parts.append("</g>")
    left = width - _LEGEND + 20
    dashed = any(name.endswith(", compensated") for _, found in tasks for name, _, _ in found)
    for index, name in enumerate((*names, *["dashed: compensated"] * dashed)):
        y = _MARGIN[1] + 20 * index
        colour = colours.get(name, "none")
        parts.append(f'<rect x="{left}" y="{y - 8}" width="16" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 24}" y="{y}">{name}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(title: str, found: Found, moment: str, colours: dict[str, str]) -> Iterator[str]:
    shares = _shares(found)
    lines = {
        name: [
            (share, values)
            for share in (1.0, *shares)
            if (values := found.get((name, share, moment)) or _dense(found, share, moment))
        ]
        for name in dict.fromkeys(n for (n, _, at), v in found.items() if at == moment and v)
        if name != "dense"
    }
    means = [statistics.fmean(values) for line in lines.values() for _, values in line]
    low, high = min(means), max(means)
    span = high - low or 1.0

    def x_of(share: float) -> float:
        return _PANEL[0] * (1 - share) / (1 - shares[-1]) * 0.97

    def y_of(value: float) -> float:
        return _PANEL[1] * (1 - (value - low) / span)

    yield f'<text x="0" y="-12" font-weight="bold">{title}</text>'
    yield f'<rect width="{_PANEL[0]}" height="{_PANEL[1]}" fill="none" stroke="#ccc"/>'
    for share in (1.0, *shares):
        yield (
            f'<text x="{x_of(share):.0f}" y="{_PANEL[1] + 16}" text-anchor="middle">{share:g}</text>'
        )
    yield f'<text x="{_PANEL[0] / 2}" y="{_PANEL[1] + 32}" text-anchor="middle">share of MACs</text>'
    for step in range(5):
        value = low + span * step / 4
        y = y_of(value)
        yield f'<line x1="0" x2="{_PANEL[0]}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>'
        yield f'<text x="-6" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    for name, line in lines.items():
        colour = colours[name.removesuffix(", compensated")]
        dashes = ' stroke-dasharray="5 3"' if name.endswith(", compensated") else ""
        points = [(x_of(share), y_of(statistics.fmean(values))) for share, values in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        yield (
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dashes}/>'
        )
        for (x, y), (_, values) in zip(points, line, strict=True):
            bar = _PANEL[1] * _standard_error(values) / span
            yield (
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - bar:.1f}" y2="{y + bar:.1f}" '
                f'stroke="{colour}"/>'
            )


def _dense(found: Found, share: float, moment: str) -> list[float]:
    dense = found.get(("dense", 1.0, moment)) or found["dense", 1.0, "cut"]
    return dense if share == 1.0 else []
