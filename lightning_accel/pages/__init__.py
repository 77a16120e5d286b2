"""Pages that people look at: one file each, that opens anywhere, of what runs wrote down."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.pages.charts import bars
    from lightning_accel.pages.drawing import Drawing
    from lightning_accel.pages.page import render, write_page
    from lightning_accel.pages.pareto import pareto_front
    from lightning_accel.pages.runs import Run, find_runs, read_run

__all__ = [
    "Drawing",
    "Run",
    "bars",
    "find_runs",
    "pareto_front",
    "read_run",
    "render",
    "write_page",
]

__getattr__ = lazily(
    __name__,
    {
        "bars": "charts",
        "Drawing": "drawing",
        "render": "page",
        "write_page": "page",
        "pareto_front": "pareto",
        "Run": "runs",
        "find_runs": "runs",
        "read_run": "runs",
    },
)
