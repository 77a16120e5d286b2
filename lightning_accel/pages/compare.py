"""Several runs side by side: which of their numbers to show, in which order, and which runs no other beats."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

from lightning_accel.errors import explain
from lightning_accel.measure.progress import thinned
from lightning_accel.pages import charts
from lightning_accel.pages.charts import Point
from lightning_accel.pages.drawing import Drawing
from lightning_accel.pages.pareto import is_lower_better, pareto_front
from lightning_accel.pages.runs import Run
from lightning_accel.pages.views import metric_rank

_MOST_METRICS, _MOST_CURVES = 4, 6


class Row(NamedTuple):
    """One run in the table."""

    name: str
    link: str
    cells: Sequence[float | None]
    is_on_front: bool


@dataclass
class Comparison:
    """What is shown of several runs together."""

    columns: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    chart: Drawing | None = None
    x: str = ""
    y: str = ""
    said: str = ""
    histories: list[tuple[str, list[str], Drawing]] = field(default_factory=list)


class Axis(NamedTuple):
    """A number that runs are compared by, and whether less of it is better."""

    name: str
    is_lower_better: bool


def compare(
    runs: Sequence[Run],
    links: Sequence[str],
    *,
    x: str | None = None,
    y: str | None = None,
    lower: Sequence[str] = (),
    higher: Sequence[str] = (),
) -> Comparison:
    """Put runs side by side, the best first.

    Args:
        runs: What to compare.
        links: Where each leads.
        x: A number by its name or a part of it, such as "latency"; by default a latency.
        y: Another; by default a metric.
        lower: Names of numbers of which less is better, where the name does not tell.
        higher: Names of numbers of which more is better.

    Raises:
        ValueError: No run has such a number.
    """
    numbers = [run.numbers() for run in runs]
    known = _names(numbers)
    first = _axis(x, known, _default_x(known), lower, higher)
    second = _axis(y, known, _default_y(known), lower, higher)
    places: list[int] = []
    front: set[int] = set()
    if first and second:
        places = [i for i, n in enumerate(numbers) if first.name in n and second.name in n]
        pairs = [(numbers[i][first.name], numbers[i][second.name]) for i in places]
        directions = (first.is_lower_better, second.is_lower_better)
        front = {places[i] for i in pareto_front(pairs, lower=directions)}
    found = Comparison(_columns(known, first, second))
    rows = [
        Row(run.name, link, [n.get(column) for column in found.columns], i in front)
        for i, (run, link, n) in enumerate(zip(runs, links, numbers, strict=True))
    ]
    found.rows = _sorted(rows, found.columns, second or first)
    found.histories = list(_histories(found, runs))
    if first and second and len(places) > 1:
        _draw(found, runs, links, numbers, places, front, (first, second))
    return found


def _histories(found: Comparison, runs: Sequence[Run]) -> Iterator[Any]:
    """Draw the first metrics of the best runs over each other."""
    by_name = {run.name: run.history() for run in runs}
    best = [row.name for row in found.rows if by_name[row.name]][:_MOST_CURVES]
    names = {name for run in best for name in by_name[run]}
    for metric in sorted(names, key=metric_rank)[:2] if len(best) > 1 else ():
        series = {run: thinned(by_name[run][metric]) for run in best if metric in by_name[run]}
        yield metric, list(series), charts.history(series, title=metric)


def _draw(
    found: Comparison,
    runs: Sequence[Run],
    links: Sequence[str],
    numbers: Sequence[dict[str, float]],
    places: Sequence[int],
    front: set[int],
    axes: tuple[Axis, Axis],
) -> None:
    first, second = axes
    points = [
        Point(runs[i].name, numbers[i][first.name], numbers[i][second.name], links[i], i in front)
        for i in places
    ]
    names = {"x_name": spelled(first.name), "y_name": spelled(second.name)}
    title = f"{names['y_name']} against {names['x_name']}"
    found.chart = charts.scatter(points, **names, title=title)
    found.x, found.y = first.name, second.name
    better = " and ".join(
        f"{'less' if axis.is_lower_better else 'more'} {spelled(axis.name)}" for axis in axes
    )
    found.said = f"Filled points are on the Pareto front: no other run has {better} at once."
    if missing := len(runs) - len(places):
        found.said += (
            f" {missing} of {len(runs)} runs lack one of the two numbers and are not drawn."
        )


def spelled(name: str) -> str:
    """Write the name of a number for people.

    >>> spelled("final_latency_ms_64"), spelled("final_metrics_val/acc"), spelled("ratio_macs")
    ('latency, batch 64 (ms)', 'val/acc', 'MACs, gain')
    """
    words = {"params": "parameters", "macs": "MACs", "steps_per_s": "training steps/s"}
    side, _, rest = name.partition("_")
    if found := re.fullmatch(r"latency(?:_ms)?_(.+)", rest):
        rest = f"latency, batch {found[1]}" + (" (ms)" if side != "ratio" else "")
    rest = words.get(rest, rest.removeprefix("metrics_"))
    return {"final": rest, "ratio": f"{rest}, gain", "dense": f"dense {rest}"}.get(side, name)


def _names(numbers: Sequence[dict[str, float]]) -> list[str]:
    """Return all names, those that most runs have first."""
    counts: dict[str, int] = {}
    for each in numbers:
        for name in each:
            counts[name] = counts.get(name, 0) + 1
    return sorted(counts, key=lambda name: -counts[name])


def _default_x(known: Sequence[str]) -> str | None:
    sizes = [n for n in known if n.startswith("final_latency_ms_")]
    largest = sorted(sizes, key=lambda n: -_size(n))
    fallback = [n for n in ("final_macs", "final_params") if n in known]
    return next(iter([*largest, *fallback]), None)


def _size(name: str) -> int:
    found = re.search(r"(\d+)$", name)
    return int(found[1]) if found else 0


def _default_y(known: Sequence[str]) -> str | None:
    return next(iter(_metrics(known)), None)


def _metrics(known: Sequence[str]) -> list[str]:
    start = "final_metrics_"
    found = [n for n in known if n.startswith(start)]
    return sorted(found, key=lambda n: metric_rank(n.removeprefix(start)))


def _axis(
    asked: str | None,
    known: Sequence[str],
    default: str | None,
    lower: Sequence[str],
    higher: Sequence[str],
) -> Axis | None:
    name = default if asked is None else _found(asked, known)
    if name is None:
        return None
    means = [word for word in (*lower, *higher) if word in (name, spelled(name)) or word == asked]
    is_lower = is_lower_better(name) if not means else means[-1] in lower
    return Axis(name, is_lower)


def _found(asked: str, known: Sequence[str]) -> str:
    """Return the number that is meant: by its name, as it is spelled, or by a part of it."""
    asked = asked.removeprefix("report/")
    for matches in (
        [n for n in known if asked in (n, spelled(n))],
        [n for n in known if n in (f"final_{asked}", f"final_metrics_{asked}")],
        sorted(
            (n for n in known if asked in n and n.startswith("final_")), key=lambda n: -_size(n)
        ),
        [n for n in known if asked in n],
    ):
        if matches:
            return matches[0]
    near = get_close_matches(asked, [spelled(n) for n in known], 3, 0.3)
    listed = ", ".join(near or [spelled(n) for n in known[:8]]) or "no number at all"
    what = f"no run has a number `{asked}`"
    raise ValueError(explain(what, listed, "name one of these with --x or --y"))


def _columns(known: Sequence[str], *axes: Axis | None) -> list[str]:
    names = [axis.name for axis in reversed(axes) if axis]
    names += [n for n in _metrics(known) if "train" not in n][:_MOST_METRICS]
    sizes = sorted((n for n in known if n.startswith("final_latency_ms_")), key=_size)
    names += [*sizes[:1], *sizes[-1:], "final_macs", "final_params"]
    names += [*(n.replace("final_latency_ms", "ratio_latency") for n in sizes[-1:]), "ratio_macs"]
    return [n for n in dict.fromkeys(names) if n in known]


def _sorted(rows: list[Row], columns: Sequence[str], axis: Axis | None) -> list[Row]:
    if axis is None or axis.name not in columns:
        return rows
    place = columns.index(axis.name)
    sign = 1 if axis.is_lower_better else -1

    def key(row: Row) -> tuple[bool, Any]:
        value = row.cells[place]
        return value is None, 0.0 if value is None else sign * value

    return sorted(rows, key=key)
