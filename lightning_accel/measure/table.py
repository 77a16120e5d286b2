"""Rows and columns for people, for a page and for a program, from the same cells."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from io import StringIO
from typing import Any

Cell = str | int | float | bool | None

_LINES = (
    "    \n    \n -- \n    \n    \n    \n    \n    \n"  # plain ASCII: also right in a pipe or a log
)


@dataclass(frozen=True)
class Table:
    """A table with a title above and notes below.

    >>> table = Table(["", "dense", "final"], [["parameters", 12345, 6100]])
    >>> print(table.to_markdown())
    |  | dense | final |
    | --- | ---: | ---: |
    | parameters | 12,345 | 6,100 |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    notes: Sequence[str] = field(default_factory=tuple)

    def to_text(self, width: int = 100) -> str:
        """Render for a terminal or a log of `width` characters: no colours, no escape codes."""
        from rich.box import Box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable(box=Box(_LINES, ascii=True), show_edge=False, pad_edge=False)
        for index, column in enumerate(self.columns):
            side = "right" if self.is_numeric(index) else "left"
            grid.add_column(Text(column), justify=side, overflow="fold")  # type: ignore[arg-type]
        for row in self.rows:
            grid.add_row(*(Text(show(cell)) for cell in row))
        out = StringIO()
        console = Console(
            file=out,
            width=width,
            force_terminal=False,
            color_system=None,
            legacy_windows=False,
            force_jupyter=False,  # else it draws into the cell of a notebook, and the text is empty
        )
        if self.title:
            console.print(Text(self.title))
        console.print(grid)
        for note in self.notes:
            console.print(Text(f"- {note}"))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def to_markdown(self) -> str:
        """Render as a GitHub table."""
        rule = ["---:" if self.is_numeric(index) else "---" for index in range(len(self.columns))]
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += [_markdown(self.columns), _markdown(rule)]
        lines += [_markdown([show(cell) for cell in row]) for row in self.rows]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def to_html(self) -> str:
        """Render for a notebook: escaped, and without styles of its own.

        >>> Table(["<b>"], [[0.5]]).to_html().count("&lt;b&gt;")
        1
        """
        side = {True: ' style="text-align: right"', False: ' style="text-align: left"'}
        sides = [side[self.is_numeric(index)] for index in range(len(self.columns))]
        parts = ["<table>", f"<caption>{escape(self.title)}</caption>" if self.title else ""]
        parts += ["<thead>", _html(self.columns, sides, "th"), "</thead><tbody>"]
        parts += [_html([show(cell) for cell in row], sides, "td") for row in self.rows]
        parts += ["</tbody></table>"]
        notes = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        return "\n".join([*parts, f"<ul>{notes}</ul>" if notes else ""])

    def to_json(self) -> str:
        """Render as JSON with unrounded cells; what is no finite number becomes null."""
        plain = {
            "title": self.title,
            "columns": list(self.columns),
            "rows": [[finite(cell) for cell in row] for row in self.rows],
            "notes": list(self.notes),
        }
        return json.dumps(plain, indent=2, allow_nan=False)

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers, and so stands to the right."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(_is_number(cell) for cell in cells)


def show(cell: Cell) -> str:
    """Write a cell: thousands separated, four digits of a fraction, a dash for nothing.

    >>> show(1234567), show(3.14159), show(None), show(12345.678), show(1.2e-7)
    ('1,234,567', '3.142', '-', '12,346', '1.2e-07')
    """
    if cell is None:
        return "-"
    if isinstance(cell, (str, bool)):
        return str(cell)
    if isinstance(cell, int) or abs(cell) >= 1000:
        return f"{cell:,.0f}"
    return f"{cell:.4g}"


def finite(value: Any) -> Any:
    """Replace what JSON cannot hold, infinities and not-a-numbers, by `None`; any nesting."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(cell: Cell) -> bool:
    if isinstance(cell, str):
        return (
            bool(cell)
            and cell.rstrip("x%").replace(",", "").lstrip("+-").replace(".", "", 1).isdigit()
        )
    return not isinstance(cell, bool)


def _html(cells: Sequence[str], sides: Sequence[str], tag: str) -> str:
    inner = (f"<{tag}{s}>{escape(c)}</{tag}>" for c, s in zip(cells, sides, strict=True))
    return f"<tr>{''.join(inner)}</tr>"


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
