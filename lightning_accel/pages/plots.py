"""The same charts as PNG or PDF, drawn shape by shape by matplotlib, where somebody asks for such a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_accel.errors import AccelError, explain
from lightning_accel.pages.drawing import DASHES, LIGHT, Box, Dot, Drawing, Label, Line
from lightning_accel.places import replace, written_whole

ENDINGS = (".svg", ".png", ".pdf")
_DPI = 100


def check_ending(path: Path) -> Path:
    """Return the path of a picture.

    Raises:
        ValueError: Its ending is that of no picture.
        AccelError: It needs matplotlib, which is not installed.

    >>> check_ending(Path("plan.svg")).name
    'plan.svg'
    """
    if path.suffix not in ENDINGS:
        found = "end the name in " + ", ".join(ENDINGS)
        raise ValueError(explain("a picture is SVG, PNG or PDF", str(path), found))
    if path.suffix != ".svg":
        _matplotlib(path)
    return path


def save(drawing: Drawing, path: Path) -> Path:
    """Write a drawing; the ending decides the form, and SVG needs nothing.

    Raises:
        ValueError: Another ending.
        AccelError: It needs matplotlib, which is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(Drawing("empty", 10, 10), Path(folder) / "a.svg").stat().st_size > 0
    True
    """
    check_ending(path)
    if path.suffix == ".svg":
        replace(path, drawing.to_svg())
        return path
    figure = _figure(drawing, path)
    with written_whole(path) as part:
        figure.savefig(part, format=path.suffix[1:], dpi=2 * _DPI)
    return path


def _matplotlib(path: Path) -> Any:
    try:
        import matplotlib
    except ImportError:
        raise AccelError(
            f"a picture that ends in {path.suffix} is drawn by matplotlib, which is not installed",
            str(path),
            "pip install 'lightning-accel[plots]', or end the name in .svg",
        ) from None
    return matplotlib


def _figure(drawing: Drawing, path: Path) -> Any:
    _matplotlib(path)
    from matplotlib.figure import Figure  # without pyplot: no window, no state of the user's

    width, height = drawing.width + 24, drawing.height + 34
    figure = Figure((width / _DPI, height / _DPI), dpi=_DPI, facecolor=LIGHT["paper"])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-12, width - 12)
    axes.set_ylim(height - 34, -34)
    axes.axis("off")
    for order, mark in enumerate(drawing.marks):
        _draw(axes, mark, order)
    axes.text(0, -12, drawing.title, fontsize=9, fontweight="bold", color=LIGHT["ink"], **_PLAIN)
    return figure


_PLAIN: dict[str, Any] = {"parse_math": False, "clip_on": False}  # a `$` in a name is a `$`


def _draw(axes: Any, mark: Any, order: int) -> None:
    from matplotlib.patches import Circle, Rectangle

    colour = LIGHT.get(mark.role, LIGHT["soft"])
    above: dict[str, Any] = {"zorder": order}  # by itself, matplotlib draws lines over bars
    if isinstance(mark, Line):
        dash = DASHES.get(mark.role)
        style: Any = (0, tuple(map(float, dash.split()))) if dash else "-"
        thin = mark.role in ("grid", "axis", "ink")
        xs, ys = zip(*mark.points, strict=True)
        axes.plot(xs, ys, color=colour, linewidth=0.7 if thin else 1.3, linestyle=style, **above)
    elif isinstance(mark, Box):
        face = "none" if mark.is_hollow else colour
        edge = colour if mark.is_hollow else "none"
        place = (mark.x, mark.y)
        axes.add_patch(Rectangle(place, mark.width, mark.height, fc=face, ec=edge, lw=0.9, **above))
    elif isinstance(mark, Dot):
        face = LIGHT["paper"] if mark.is_hollow else colour
        place = (mark.x, mark.y)
        axes.add_patch(Circle(place, mark.radius, fc=face, ec=colour, lw=1.2, **above))
    elif isinstance(mark, Label):
        side = {"start": "left", "middle": "center", "end": "right"}[mark.anchor]
        weight = "bold" if mark.is_strong else "normal"
        words = {
            "ha": side,
            "fontweight": weight,
            "color": colour,
            "fontsize": 8.5,
            **_PLAIN,
            **above,
        }
        axes.text(mark.x, mark.y, mark.text, va="baseline", **words)
