"""The templates of pages and pictures, and the one place where they are loaded: everything in them is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment() -> Environment:
    """Return the environment of all templates.

    >>> environment().from_string("{{ name }}").render(name="<script>")
    '&lt;script&gt;'
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from lightning_accel.measure.table import show
    from lightning_accel.pages.drawing import DARK, DASHES, LIGHT, Box, Dot, Label, Line

    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    kinds = {Line: "line", Box: "box", Dot: "dot", Label: "label"}
    found.filters |= {"kind": lambda mark: kinds[type(mark)], "show": show}
    found.globals |= {"light": LIGHT, "dark": DARK, "dashes": DASHES}
    return found


def text_of(name: str) -> str:
    """Return a file beside the templates, as it is.

    >>> "svg" in text_of("chart.css.j2")
    True
    """
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
