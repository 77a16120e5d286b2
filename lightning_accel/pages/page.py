"""One page of one run or of several: a single HTML file that asks nothing of any network, and that prints."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_accel.measure.table import show
from lightning_accel.pages.compare import Comparison, compare, spelled
from lightning_accel.pages.runs import Run, read_run
from lightning_accel.pages.templates import environment, text_of
from lightning_accel.pages.views import RunView, view
from lightning_accel.places import free, is_there, replace, starts_with

MARK = "<!-- Written by lightning-accel report. -->"
"""By which a page of ours is known: nothing else is overwritten."""
_MOST_IN_FULL = 40


def render(
    runs: Sequence[Run],
    *,
    title: str = "",
    states: Sequence[str] = (),
    live: Any = None,
    **axes: Any,
) -> str:
    """Return a page as text.

    Args:
        runs: What to show; of very many, those after the fortieth are in the table alone.
        title: Heading; by default the name of the only run, or how many there are.
        states: What is said of each run at its head; by default what its files say.
        live: `address` and `version` for a page that asks whether something is new.
        axes: As `compare` takes them.

    Raises:
        ValueError: A number was asked for that no run has.

    >>> from pathlib import Path
    >>> text = render([Run(Path("runs/a"), name="<b>")])
    >>> text.count("&lt;b&gt;") > 0, "<b>" in text, "http:" in text
    (True, False, False)
    """
    said = list(states) or [""] * len(runs)
    full = runs[:_MOST_IN_FULL]
    views = [view(run, f"run-{i + 1}", said[i]) for i, run in enumerate(full)]
    links = [f"#run-{i + 1}" if i < len(full) else "" for i in range(len(runs))]
    together = compare(runs, links, **axes) if len(runs) > 1 else None
    return _page(
        title=title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs"),
        views=views,
        together=together,
        num_left=len(runs) - len(full),
        live=live,
    )


def write_page(report: Path, again: Path | None = None) -> Path:
    """Write the page of one run beside its report, or where it was written before, and return where it is.

    A page of ours that is there is replaced; any other file stays, and a number comes to the name.

    Raises:
        OSError: There is no place to write.
    """
    target = again or free(report.with_suffix(".html"), is_free)
    run = read_run(report)
    run.progress = {}  # the fit has ended, and its file goes
    replace(target, render([run]))
    return target


def is_free(path: Path) -> bool:
    """Whether writing a page here would overwrite nothing but an earlier page."""
    return not is_there(path) or starts_with(path, f"<!doctype html>\\s*{MARK}")


def drawings(runs: Sequence[Run], **axes: Any) -> dict[str, Any]:
    """Return every chart of the page by a name that a file can have."""
    together = compare(runs, [""] * len(runs), **axes) if len(runs) > 1 else None
    found: dict[str, Any] = {}
    if together is not None and together.chart is not None:
        found["runs"] = together.chart
    for index, run in enumerate(runs[:_MOST_IN_FULL]):
        start = f"run-{index + 1}-" if len(runs) > 1 else ""
        shown = view(run, "").drawings()
        found |= {f"{start}{name}": drawing for name, drawing in shown.items()}
    return found


def _page(
    *,
    title: str,
    views: Sequence[RunView],
    together: Comparison | None,
    num_left: int,
    live: Any,
) -> str:
    script = text_of("page.js").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment().get_template("page.html.j2")
    return template.render(
        mark=MARK,
        title=title,
        views=views,
        together=together,
        num_left=num_left,
        live=live,
        states={shown.run.name: shown.state for shown in views},
        script=script,
        digest=digest,
        spelled=spelled,
        show=show,
    )
