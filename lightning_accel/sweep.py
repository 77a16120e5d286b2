"""What the jobs of a Hydra sweep gave, side by side on one page that is kept while the sweep goes on.

Hydra tells a callback of each job that ends, and of the end of the sweep, unless a job has failed: then it raises, after all
the others have run. So the page is written after each job. Numbers are those that `AccelReport` wrote in each; which runs no
other beats, in two of them, is the Pareto front.

In the configuration of an app:

    hydra:
      callbacks:
        sweep:
          _target_: lightning_accel.sweep.SweepPage
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning_accel.errors import explain
from lightning_accel.measure.table import Cell, Table, show
from lightning_accel.pages.compare import Comparison, compare
from lightning_accel.pages.page import is_free, render
from lightning_accel.pages.runs import Run, find_runs
from lightning_accel.places import replace

_log = logging.getLogger(__name__)
NAME = "sweep.html"
_EACH = 64
"""Jobs after each of which the page is written; later it is written at each doubling, and at the end."""


class SweepPage:
    """Keep a page with all jobs of a sweep in its folder, and say at the end which of them no other beats.

    Args:
        x: A number that jobs are compared by, such as "latency" or "macs"; by default a latency.
        y: Another, such as "val/acc"; by default a metric.
        lower: Names of numbers of which less is better, where the name does not tell.
        higher: Names of numbers of which more is better.

    >>> SweepPage(x="macs", y="val/acc").axes["x"]
    'macs'
    """

    def __init__(
        self,
        x: str | None = None,
        y: str | None = None,
        lower: list[str] | None = None,
        higher: list[str] | None = None,
    ) -> None:
        self.axes: dict[str, Any] = {
            "x": x,
            "y": y,
            "lower": list(lower or ()),
            "higher": list(higher or ()),
        }
        self._ended = 0
        self._failed: list[str] = []
        self._there: dict[Path, int] = {}  # reports of a sweep before, and when they were written

    def __getattr__(self, name: str) -> Any:
        # What else Hydra calls; its own base class would be imported by all who do not sweep.
        if name.startswith("on_"):
            return _nothing
        raise AttributeError(name)

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        """Note which reports lie in the job's folder already, from a sweep before."""
        for path in Path(config.hydra.runtime.output_dir).rglob("report.json"):
            self._there[path.resolve()] = path.stat().st_mtime_ns

    def on_job_end(self, config: Any, job_return: Any, **kwargs: Any) -> None:
        """Write the page anew, where this is a job of a sweep."""
        from hydra.core.utils import JobStatus

        if config.hydra.mode is None or config.hydra.mode.name != "MULTIRUN":
            return
        self._ended += 1
        if job_return.status is JobStatus.FAILED:
            words = " ".join(config.hydra.overrides.task) or f"job {config.hydra.job.num}"
            self._failed.append(words)
            # At once, and each: Hydra itself tells the first one, after the last job (hydra #2284).
            _log.error("Failed: %s: %s", words, _line(job_return))
        if self._ended <= _EACH or self._ended & (self._ended - 1) == 0:
            self._write(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        """Write the page a last time, and say what it shows."""
        folder = Path(config.hydra.sweep.dir)
        runs = self._write(folder)
        if len(runs) > 1:
            _log.info(_table(compare(runs, [""] * len(runs), **self.axes)).to_text(120))
        if runs:
            _log.info("Wrote %s", folder / NAME)
        else:
            _log.info(
                "There is no report.json in %s. `AccelReport`, which all presets have, writes into the job's folder where the "
                "Trainer has no logger, else beside its logs: set trainer.default_root_dir=${hydra:runtime.output_dir}.",
                folder,
            )

    def _write(self, folder: Path) -> list[Run]:
        """Write the page, and return what is on it; a sweep is never ended by it."""
        try:
            runs = [run for run in find_runs(folder) if not self._is_of_before(run)]
            if not runs:
                return []
            failed = f", {len(self._failed)} failed" if self._failed else ""
            title = f"{folder.name}: {len(runs)} runs{failed}"
            page = self._rendered(runs, title)
            if not is_free(folder / NAME):
                raise ValueError(f"{folder / NAME} is another file")
            replace(folder / NAME, page)
        except Exception as error:  # the jobs are worth more than their page
            found, do = (
                f"{type(error).__name__}: {error}",
                f"call `lightning-accel report {folder}`",
            )
            _log.warning(explain("the page of this sweep was not written", found, do))
            return []
        return runs

    def _is_of_before(self, run: Run) -> bool:
        """Whether a job of this sweep left what a sweep before wrote into its folder."""
        known = None if run.file is None else self._there.get(run.file.resolve())
        return known is not None and run.file is not None and run.file.stat().st_mtime_ns == known

    def _rendered(self, runs: list[Run], title: str) -> str:
        if len(runs) == 1:  # which has no axes
            return render(runs, title=title)
        try:
            return render(runs, title=title, **self.axes)
        except ValueError as error:  # of an axis that no run has
            _log.warning("%s The page is without it.", error)
            self.axes = {}
            return render(runs, title=title)


def _nothing(**kwargs: Any) -> None:
    pass


def _line(job_return: Any) -> str:
    error = job_return._return_value
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said[:160]}"


def _table(found: Comparison) -> Table:
    rows: list[list[Cell]] = [
        [
            row.name,
            *(None if v is None else show(v) for v in row.cells),
            "*" if row.is_on_front else "",
        ]
        for row in found.rows
    ]
    note = f"* no other is better in both {found.x} and {found.y}" if found.x else ""
    return Table(["run", *found.columns, ""], rows, "Runs of this sweep", (note,) if note else ())
