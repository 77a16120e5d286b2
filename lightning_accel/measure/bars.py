"""A bar chart as SVG text, for pages and browsers, with nothing to install."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0")
_ROW, _BAR, _LABELS, _PANEL, _GAP, _TOP = 22, 14, 260, 220, 70, 64


def bars_svg(labels: Sequence[str], panels: Mapping[str, Sequence[float]], *, title: str) -> str:
    """Draw one horizontal bar per label in each panel; each panel has its own scale, from zero.

    Args:
        labels: What the rows are.
        panels: Values by the panel's heading, one per label. Negative ones are drawn as nothing, with
            their number.
        title: Heading of the whole.

    >>> bars_svg(["a<b"], {"time": [0.5]}, title="Saved").count("<rect")
    2
    """
    width = _LABELS + len(panels) * (_PANEL + _GAP) + 10
    height = _TOP + _ROW * len(labels) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
    ]
    for row, label in enumerate(labels):
        parts.append(_text(_LABELS - 8, row, _shortened(label), anchor="end"))
    for column, (heading, values) in enumerate(panels.items()):
        left = _LABELS + column * (_PANEL + _GAP)
        colour = _COLOURS[column % len(_COLOURS)]
        parts.append(f'<text x="{left}" y="{_TOP - 10}" fill="{colour}">{escape(heading)}</text>')
        scale = max([*values, 0.0]) or 1.0
        for row, value in enumerate(values):
            length = _PANEL * max(value, 0.0) / scale
            y = _TOP + _ROW * row + (_ROW - _BAR) / 2
            parts.append(
                f'<rect x="{left}" y="{y:g}" width="{length:.1f}" height="{_BAR}" fill="{colour}"/>'
            )
            parts.append(_text(left + length + 5, row, f"{value:.3g}"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, row: int, text: str, anchor: str = "start") -> str:
    y = _TOP + _ROW * row + _ROW * 0.68
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _shortened(label: str, length: int = 38) -> str:
    return label if len(label) <= length else "…" + label[1 - length :]
