"""The dense model against the final one: same inputs, same process, interleaved, as one report.

Everything comes in as callables, so nothing here knows a Trainer. A time is the tenth percentile of
its blocks, which other work on the machine disturbs least; the median and the spread stand beside it
under `spread`. A gain is dense by final: 2.0 means half the arithmetic, half the time, twice the steps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from lightning_accel.measure.flops import MacsCount
from lightning_accel.measure.memory import model_size
from lightning_accel.measure.table import Cell, Table, finite, show
from lightning_accel.measure.timing import Comparison, compare
from lightning_accel.places import is_there, replace, starts_with
from lightning_accel.progress import Step, progress

_TITLE = "Dense model against final model"
_TELLING = 0.95
"""Gains that may be above this are not called slower: two equal calls differ by up to 5 %."""

_WIDEST = 2.0
"""A gain is withheld when the upper end of its interval is more than this times the lower."""

_LEAST_LEFT = 0.5
"""And where other work left less of the processor: at a third, 2.8x once read 5.1x (3.3 to 6.5)."""


class MeasuredModel(NamedTuple):
    """One side of a report: a model and what to run.

    `forward` has one call per batch size, `step` is one forward and backward, `macs` those of one
    sample. What is `None` or absent on either side is left out of the report.
    """

    model: nn.Module
    forward: Mapping[int, Callable[[], Any]]
    step: Callable[[], Any] | None = None
    macs: MacsCount | None = None


@dataclass
class Side:
    """What is known of one side; `latency_ms` by batch size, `metrics` by their logged names."""

    params: int | None = None
    macs: int | None = None
    latency_ms: dict[str, float] = field(default_factory=dict)
    steps_per_s: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Ratios:
    """The gains: 2.0 means half the arithmetic, half the time, twice the steps; what is withheld is absent."""

    macs: float | None = None
    params: float | None = None
    latency: dict[str, float] = field(default_factory=dict)
    steps_per_s: float | None = None


@dataclass
class Report:
    """What an edit or a whole fit gave; `extra` holds further keys of the JSON file.

    With `dense_metrics_after_epoch` in `extra`, the dense metrics are those of a shorter training: they
    are labelled so, and no gain is given beside them. `dense_validated_after_epoch`, and the same of `final`,
    hold the epochs of metrics that were last logged earlier than that side's training ended.

    >>> report = Report(Side(params=100), Side(params=50), Ratios(params=2.0))
    >>> report.to_dict()["ratios"]["params"]
    2.0
    >>> Report.from_dict(report.to_dict()) == report
    True
    """

    NUMBERS: ClassVar[tuple[str, ...]] = (
        *("report/ratio_macs", "report/ratio_params", "report/ratio_steps_per_s"),
        "report/ratio_latency_*",
        *("report/final_macs", "report/final_params", "report/final_steps_per_s"),
        *("report/final_latency_ms_*", "report/final_metrics_*"),
        *("report/dense_macs", "report/dense_params", "report/dense_steps_per_s"),
        *("report/dense_latency_ms_*", "report/dense_metrics_*", "report/before_edit_*"),
    )
    """The names that `flat` may give."""

    dense: Side = field(default_factory=Side)
    final: Side = field(default_factory=Side)
    ratios: Ratios = field(default_factory=Ratios)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, with `null` for what is unknown or no finite number."""
        known = {
            "dense": asdict(self.dense),
            "final": asdict(self.final),
            "ratios": asdict(self.ratios),
        }
        plain: dict[str, Any] = finite({**known, **self.extra})
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Report:
        """Read what `to_dict` gave."""
        extra = {k: v for k, v in plain.items() if k not in ("dense", "final", "ratios")}
        sides = Side(**plain["dense"]), Side(**plain["final"])
        return cls(*sides, Ratios(**plain["ratios"]), extra)

    def note(self, text: str) -> None:
        """Add a remark for the reader of the table, once."""
        notes = self.extra.setdefault("notes", [])
        if text not in notes:
            notes.append(text)

    def table(self, title: str = _TITLE) -> Table:
        """Return the report as a table with the columns dense, final and gain."""
        gains = self.gains()
        rows: list[list[Cell]] = [
            [name, before, after, _times(gains.get(name))]
            for name, before, after in self.quantities()
        ]
        rows += self._metric_rows()
        return Table(
            ["", "dense", "final", "gain"], rows, title, tuple(self.extra.get("notes", ()))
        )

    def _repr_html_(self) -> str:
        """Show it in a notebook.

        >>> "2.00x" in Report(Side(params=2), Side(params=1), Ratios(params=2.0))._repr_html_()
        True
        """
        return self.table().to_html()

    def gains(self) -> dict[str, float]:
        """Return every gain that is given, by the name of its row.

        >>> Report(ratios=Ratios(params=2.0, latency={"64": 3.0})).gains()
        {'parameters': 2.0, 'latency, batch 64 (ms)': 3.0}
        """
        known = {"parameters": self.ratios.params, "MACs per sample": self.ratios.macs}
        known |= {_latency(batch): gain for batch, gain in self.ratios.latency.items()}
        known["training steps/s"] = self.ratios.steps_per_s
        return {name: gain for name, gain in known.items() if gain is not None}

    def quantities(self) -> Iterator[tuple[str, float | None, float | None]]:
        """Yield name, dense and final of each quantity but metrics.

        >>> next(Report(Side(params=2), Side(params=1)).quantities())
        ('parameters', 2, 1)
        """
        yield "parameters", self.dense.params, self.final.params
        yield "MACs per sample", self.dense.macs, self.final.macs
        for batch, before in self.dense.latency_ms.items():
            yield _latency(batch), before, self.final.latency_ms.get(batch)
        yield "training steps/s", self.dense.steps_per_s, self.final.steps_per_s

    def _metric_rows(self) -> list[list[Cell]]:
        shorter = self.extra.get("dense_metrics_after_epoch")
        earlier = self.extra.get("dense_validated_after_epoch", {})
        last = self.extra.get("final_validated_after_epoch", {})
        rows: list[list[Cell]] = []
        for name in {**self.dense.metrics, **self.final.metrics}:
            before, after = self.dense.metrics.get(name), self.final.metrics.get(name)
            shown = _after(after, last.get(name))
            if before is not None and shorter is not None:
                epoch = min(shorter, earlier.get(name, shorter))
                rows.append([name, _after(before, epoch), shown, None])
            elif before is None or after is None:
                rows.append([name, before, shown, None])
            else:
                rows.append([name, before, shown, f"{after - before:+.4g}"])
        return rows

    def flat(self, prefix: str = "report") -> dict[str, float]:
        """Return every number under one key each, as loggers want it.

        >>> early = Report(Side(metrics={"acc": 0.7}), extra={"dense_metrics_after_epoch": 3})
        >>> early.flat()
        {'report/before_edit_acc': 0.7, 'report/before_edit_epochs': 3.0}
        """
        numbers: dict[str, float] = {}

        def visit(key: str, value: Any) -> None:
            if isinstance(value, dict):
                for name, item in value.items():
                    visit(f"{key}_{name}", item)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                numbers[key] = float(value)

        plain = self.to_dict()
        if (shorter := plain.get("dense_metrics_after_epoch")) is not None:
            early = {**plain["dense"].pop("metrics"), "epochs": shorter}
            visit(f"{prefix}/before_edit", early)
        for key, part in (("dense", "dense"), ("final", "final"), ("ratio", "ratios")):
            visit(f"{prefix}/{key}", plain[part])
        return numbers

    @staticmethod
    def is_free(path: str | Path) -> bool:
        """Whether `save` would overwrite nothing here but an earlier report."""
        target = Path(path)
        beside = target.with_suffix(".md")
        if is_there(beside) and not starts_with(beside, re.escape(f"**{_TITLE}")):
            return False
        if not is_there(target):
            return not is_there(beside)
        try:
            Report.from_dict(json.loads(target.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
            return False
        return not target.is_symlink()

    def save(self, path: str | Path) -> tuple[Path, Path]:
        """Write `path` as JSON and its neighbour of the same name as markdown, each atomically."""
        target = Path(path)
        beside = target.with_suffix(".md")
        replace(target, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        replace(beside, self.table().to_markdown() + "\n")
        return target, beside


def measure_pair(
    dense: MeasuredModel,
    final: MeasuredModel,
    *,
    device: torch.device | str = "cpu",
    budget_s: float = 10.0,
    report: Report | None = None,
) -> Report:
    """Measure two subjects side by side.

    Args:
        dense: The model as it was.
        final: The model as it is.
        device: Where both are.
        budget_s: Seconds of measuring, shared by all comparisons; warm-up and compilation not included.
        report: A report to fill, so that what was measured before an error is kept.

    >>> net = nn.Linear(64, 64)
    >>> subject = MeasuredModel(net, {1: lambda: net(torch.ones(1, 64))})
    >>> measure_pair(subject, subject, budget_s=0.05).ratios.params
    1.0
    """
    report = report if report is not None else Report()
    _count(report, dense, final)
    sizes = [batch for batch in dense.forward if batch in final.forward]
    step = dense.step is not None and final.step is not None
    share_s = budget_s / max(1, len(sizes) + step)
    with progress("measuring the network beside what it was", len(sizes) + step) as tell:
        _time(report, dense, final, sizes, device, share_s, tell)
    return report


def _time(
    report: Report,
    dense: MeasuredModel,
    final: MeasuredModel,
    sizes: Sequence[Any],
    device: torch.device | str,
    share_s: float,
    tell: Step,
) -> None:
    for batch in sizes:
        tell(f"batch {batch}")
        found = compare(dense.forward[batch], final.forward[batch], device=device, budget_s=share_s)
        tell(by=1)
        key = str(batch)
        report.dense.latency_ms[key] = found.baseline.p10_ms
        report.final.latency_ms[key] = found.candidate.p10_ms
        if (gain := _told(found)) is not None:
            report.ratios.latency[key] = gain
        _keep_spread(report, f"latency_{key}", found)
    if dense.step is not None and final.step is not None:
        tell("a training step")
        found = compare(dense.step, final.step, device=device, budget_s=share_s)
        report.dense.steps_per_s = 1000 / found.baseline.p10_ms
        report.final.steps_per_s = 1000 / found.candidate.p10_ms
        report.ratios.steps_per_s = _told(found)
        _keep_spread(report, "training_step", found)


def _count(report: Report, dense: MeasuredModel, final: MeasuredModel) -> None:
    sizes = {"dense": model_size(dense.model), "final": model_size(final.model)}
    report.dense.params, report.final.params = sizes["dense"].params, sizes["final"].params
    memory = {f"{side}_bytes": s.param_bytes + s.buffer_bytes for side, s in sizes.items()}
    report.extra.setdefault("memory", {}).update(memory)
    report.ratios.params = _gain(report.dense.params, report.final.params)
    if dense.macs is None or final.macs is None:
        return
    report.dense.macs, report.final.macs = dense.macs.macs, final.macs.macs
    report.ratios.macs = _gain(dense.macs.macs, final.macs.macs)
    missed = sorted({*dense.macs.missed, *final.macs.missed})
    report.extra["macs_partial"] = bool(missed)
    if missed:
        report.extra["macs_missed"] = missed
        report.note(f"MACs are partial, no formula for: {', '.join(missed[:6])}")


def _keep_spread(report: Report, key: str, found: Comparison) -> None:
    report.extra.setdefault("spread", {})[key] = {
        "dense": found.baseline._asdict(),
        "final": found.candidate._asdict(),
        "ratio_low": found.low,
        "ratio_high": found.high,
        "busy": found.busy,
        "left": found.left,
    }
    if _told(found) is None:
        why = (
            f"it may be anything between {found.low:.3g}x and {found.high:.3g}x"
            if found.left >= _LEAST_LEFT
            else f"other work left {found.left:.0%} of the processor"
        )
        report.note(f"no gain is given for {key}: {why}. Measure again on a quiet machine")
        return
    if found.high < _TELLING:
        report.note(
            f"the final model is slower here: {key}, {found.ratio:.2f}x "
            f"(between {found.low:.2f}x and {found.high:.2f}x)"
        )
    if found.contended:
        report.note(
            f"other work disturbed {key}: the threads ran {found.busy:.0%} of the time, "
            f"gain between {found.low:.2f}x and {found.high:.2f}x"
        )


def is_useful(low: float, high: float) -> bool:
    """Whether an interval of a gain is narrow enough to say anything.

    >>> is_useful(1.9, 2.4), is_useful(2.58, 285.95)
    (True, False)
    """
    return 0 < low <= high < math.inf and high <= _WIDEST * low


def _told(found: Comparison) -> float | None:
    told = is_useful(found.low, found.high) and found.left >= _LEAST_LEFT
    return found.ratio if told else None


def _after(value: float | None, epoch: int | None) -> Cell:
    return value if value is None or epoch is None else f"{show(value)} after epoch {epoch}"


def _latency(batch: str) -> str:
    return f"latency, batch {batch} (ms)"


def _gain(dense: float | None, final: float | None) -> float | None:
    return dense / final if dense is not None and final else None


def _times(gain: float | None) -> str | None:
    return None if gain is None else f"{gain:.2f}x"
