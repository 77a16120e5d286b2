"""One run as a page shows it: what is said of it, in which words, and which charts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

from lightning_accel.measure.progress import thinned
from lightning_accel.measure.table import Table, show
from lightning_accel.pages import charts
from lightning_accel.pages.charts import Gain
from lightning_accel.pages.drawing import Drawing
from lightning_accel.pages.runs import Run, mapping, objects, real, reals, texts

_MOST_CHARTS = 12
_MOST_LAYERS = 1000


class Card(NamedTuple):
    """One number that is read first; `tone` is "", "worse" or "soft"."""

    label: str
    value: str
    under: str
    tone: str = ""


class Entry(NamedTuple):
    """One thing that was done."""

    when: str
    technique: str
    settings: str
    lines: Sequence[str]
    left_alone: Sequence[str]
    notes: Sequence[str]
    num_changes: int


@dataclass
class RunView:
    """What the template shows of a run."""

    run: Run
    id: str
    state: str = ""
    tone: str = ""
    cards: list[Card] = field(default_factory=list)
    table: Table | None = None
    gains: Drawing | None = None
    entries: list[Entry] = field(default_factory=list)
    histories: list[tuple[str, list[str], Drawing]] = field(default_factory=list)
    waterfall: Drawing | None = None
    trials: Table | None = None
    latencies: Drawing | None = None
    layers: Drawing | None = None
    layer_table: Table | None = None
    sensitivity: Drawing | None = None
    formats: Table | None = None
    memory: list[tuple[str, str]] = field(default_factory=list)
    environment: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def drawings(self) -> dict[str, Drawing]:
        """Return every chart by a name that a file can have."""
        named = {"gains": self.gains, "waterfall": self.waterfall, "latency": self.latencies}
        named |= {"layers": self.layers, "sensitivity": self.sensitivity}
        named |= {f"history-{name}": drawing for name, _, drawing in self.histories}
        found: dict[str, Drawing] = {}
        for name, drawn in named.items():
            if drawn is not None:
                plain = _file_name(name)
                again = sum(known.partition("~")[0] == plain for known in found)
                found[f"{plain}~{again + 1}" if again else plain] = drawn
        return found


def view(run: Run, id: str, state: str = "") -> RunView:
    """Gather what is shown of a run.

    >>> from pathlib import Path
    >>> run = Run(Path("a"), report={"dense": {"params": 8}, "final": {"params": 4}, "ratios": {"params": 2.0}})
    >>> view(run, "run-1").cards[0]
    Card(label='parameters', value='2.00x', under='8 → 4', tone='')
    """
    found = RunView(run, id, state or _state(run), _tone(run))
    report = run.sides()
    gains = list(_gains(run))
    found.cards = [_card(gain, run) for gain in gains] + list(_metric_cards(run))
    found.table = report.table("Before and after") if report.flat() else None
    shown = [gain for gain in gains if gain.value is not None or gain.low is not None]
    found.gains = charts.gains(shown, title="Gains, dense by final") if shown else None
    found.entries = [_entry(entry) for entry in run.timeline()]
    found.histories = list(_histories(run))
    _show_tuning(found)
    spread = mapping(run.report.get("spread"))
    drawn = charts.latencies({k: mapping(v) for k, v in spread.items()})
    found.latencies = drawn if drawn.marks else None
    _show_layers(found)
    _show_sensitivity(found)
    found.formats = _formats(run)
    found.memory, found.environment = list(_memory(run)), list(_environment(run))
    found.notes = list(dict.fromkeys(_notes(run)))
    return found


def _gains(run: Run) -> Iterator[Gain]:
    """Yield each gain with its interval; one that was measured and withheld has an interval alone."""
    report = run.sides()
    given, spread = report.gains(), mapping(run.report.get("spread"))
    for name, before, after in report.quantities():
        if before is None and after is None:
            continue
        batch = re.search(r"batch (\S+) ", name)
        key = f"latency_{batch[1]}" if batch else "training_step" if "steps/s" in name else ""
        interval = mapping(spread.get(key))
        low, high = real(interval.get("ratio_low")), real(interval.get("ratio_high"))
        yield Gain(name.removesuffix(" (ms)"), given.get(name), low, high)


def _card(gain: Gain, run: Run) -> Card:
    rows = {name.removesuffix(" (ms)"): (a, b) for name, a, b in run.sides().quantities()}
    before, after = rows[gain.name]
    under = f"{show(before)} → {show(after)}"
    if "latency" in gain.name:
        under += " ms"
    if gain.value is None:
        return Card(gain.name, "withheld" if gain.low is not None else "-", under, "soft")
    tone = "worse" if gain.value < 0.95 else "" if abs(gain.value - 1) > 0.005 else "soft"
    return Card(gain.name, f"{gain.value:.2f}x", under, tone)


def _metric_cards(run: Run) -> Iterator[Card]:
    report = run.sides()
    names = sorted(report.final.metrics, key=metric_rank)[:1]
    shorter = report.extra.get("dense_metrics_after_epoch")
    for name in names:
        before = report.dense.metrics.get(name)
        after = "" if shorter is None else f" after epoch {show(shorter)}"
        under = f"dense: {show(before)}{after}" if before is not None else "of the final network"
        yield Card(name, show(report.final.metrics[name]), under)


def metric_rank(name: str) -> tuple[int, int, str]:
    """Sort metrics by how likely somebody asks for them first; runs are chosen by validation, and not by the test.

    >>> sorted(["train/loss", "val/loss", "test/acc", "val/acc"], key=metric_rank)
    ['val/acc', 'test/acc', 'val/loss', 'train/loss']
    """
    lowered = name.lower()
    of = next((i for i, word in enumerate(("val", "test", "")) if word in lowered), 2)
    of = 3 if "train" in lowered else of
    loss = 1 if "loss" in lowered else 0
    return (2 if of == 3 else loss, of, name)


def _entry(entry: Mapping[str, Any]) -> Entry:
    epoch, step = real(entry.get("epoch")), real(entry.get("step"))
    when = "start" if not step else f"epoch {show(epoch)}" if epoch is not None else ""
    settings = ", ".join(f"{k} {_spelled(v)}" for k, v in mapping(entry.get("settings")).items())
    lines, left = texts(entry.get("did")), texts(entry.get("left_alone"))
    count = int(real(entry.get("num_changes")) or 0)
    name = str(entry.get("technique", ""))
    return Entry(when, name, settings, lines, left, texts(entry.get("notes")), count)


def _spelled(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else show(value)


def _histories(run: Run) -> Iterator[tuple[str, list[str], Drawing]]:
    groups: dict[str, dict[str, Any]] = {}
    for name, points in run.history().items():
        groups.setdefault(_kind(name), {})[name] = thinned(points)
    order = sorted(groups, key=lambda kind: min(metric_rank(name) for name in groups[kind]))
    for kind in order[:_MOST_CHARTS]:
        names = sorted(groups[kind], key=lambda name: ("train" not in name, name))[:6]
        series = {name: groups[kind][name] for name in names}
        yield kind, names, charts.history(series, run.edits(), title=kind)


def _kind(name: str) -> str:
    """Return what a metric measures: that of training and of validation is drawn together.

    >>> _kind("train/loss"), _kind("val_loss"), _kind("validation/top5/acc")
    ('loss', 'loss', 'top5/acc')
    """
    return re.sub(r"^(train|training|val|valid|validation|test)[/_.-]", "", name) or name


def _show_tuning(found: RunView) -> None:
    steps = [
        {**bar, "label": str(bar.get("label", "")), "ratio": real(bar.get("ratio")) or 1.0}
        for bar in objects(found.run.tuning.get("bars"))
        if real(bar.get("step_ms")) is not None
    ]
    if steps:
        found.waterfall = charts.waterfall(steps, title="A training step, tuned")
    rows: list[Any] = [
        [str(t.get("technique")), str(t.get("value")), str(t.get("verdict")), _times(t), _why(t)]
        for t in objects(found.run.tuning.get("trials"))
    ]
    if rows:
        found.trials = Table(["technique", "value", "verdict", "gain", "why"], rows)


def _times(trial: Mapping[str, Any]) -> str | None:
    ratio = real(trial.get("ratio"))
    return None if ratio is None else f"{ratio:.2f}x"


def _why(trial: Mapping[str, Any]) -> str:
    return str(trial.get("reason") or "")


def _show_layers(found: RunView) -> None:
    rows: list[dict[str, Any]] = [
        {
            "layer": str(row.get("layer") or "the network itself"),
            "kind": str(row.get("kind") or ""),
            **{
                key: int(real(row.get(key)) or 0)
                for key in ("before", "after", "params_before", "params_after")
            },
        }
        for row in objects(found.run.report.get("widths"))[:_MOST_LAYERS]
    ]
    if not rows:
        return
    found.layers = charts.layers(rows)
    keys = ("layer", "kind", "before", "after", "params_before", "params_after")
    columns = ["layer", "kind", "width before", "after", "parameters before", "after"]
    found.layer_table = Table(columns, [[row[key] for key in keys] for row in rows])


def _show_sensitivity(found: RunView) -> None:
    rows = objects(found.run.plan.get("groups"))
    if not rows:
        return
    of = str(found.run.plan.get("change_of", "output"))
    panels = {
        "MACs saved, %": [100 * (real(row.get("macs_saved")) or 0.0) for row in rows],
        "time saved, %": [100 * (real(row.get("time_saved")) or 0.0) for row in rows],
        f"change of the {of}": [real(row.get("change")) or 0.0 for row in rows],
    }
    share = real(found.run.plan.get("share")) or 0.0
    title = f"{share:.0%} of each layer's units removed, one layer at a time"
    names = [str(row.get("name", "")) for row in rows]
    found.sensitivity = charts.bars(names, panels, title=title)


def _formats(run: Run) -> Table | None:
    rows: list[Any] = []
    for row in objects(run.bundle.get("candidates")):
        paces = mapping(row.get("paces"))
        told = [f"batch {n}: {show(real(mapping(p).get('ms')))} ms" for n, p in paces.items()]
        size = real(row.get("bytes"))
        said = str(row.get("reason") or row.get("said") or "")
        rows.append([str(row.get("format")), ", ".join(told), size and _bytes(size), said])
    return Table(["format", "time", "size", ""], rows) if rows else None


def _memory(run: Run) -> Iterator[tuple[str, str]]:
    known = reals(run.report.get("memory"))
    words = {
        "dense_bytes": "dense network, weights and buffers",
        "final_bytes": "final network, weights and buffers",
        "device_peak_bytes": "most that the allocator held on the device",
        "host_peak_bytes": "most that the process held on the host",
    }
    for key, word in words.items():
        if key in known:
            yield word, _bytes(known[key])


def _environment(run: Run) -> Iterator[tuple[str, str]]:
    report = run.report
    hardware, around = mapping(report.get("hardware")), mapping(report.get("environment"))
    fit = reals(report.get("fit"))
    if "seconds" in fit:
        yield "training took", str(timedelta(seconds=round(fit["seconds"])))
    if "epochs" in fit:
        yield "epochs, steps", f"{show(fit['epochs'])}, {show(fit.get('steps'))}"
    for word, value in (
        ("finished", report.get("finished")),
        ("device", hardware.get("name")),
        ("kind", hardware.get("kind")),
        ("cores", hardware.get("num_cores")),
        ("fast formats", ", ".join(texts(hardware.get("fast_dtypes")))),
        ("threads", report.get("num_threads")),
        ("precision", report.get("precision") or run.progress.get("precision")),
        ("processes", report.get("world_size")),
        ("strategy", around.get("strategy")),
        ("platform", around.get("platform")),
    ):
        if value not in (None, ""):
            yield word, show(value) if isinstance(value, (int, float)) else str(value)
    versions = {**mapping(report.get("versions")), **mapping(around.get("packages"))}
    for name, version in versions.items():
        yield str(name), str(version)
    if run.overrides:
        yield "overrides", " ".join(run.overrides)


def _notes(run: Run) -> Iterator[str]:
    yield from texts(run.report.get("notes"))
    yield from (f"tuner: {note}" for note in texts(run.tuning.get("notes")))
    yield from (f"bundle: {note}" for note in texts(run.bundle.get("notes")))
    for row in objects(run.bundle.get("candidates")):
        if row.get("reason"):
            yield f"{row.get('format')} was refused: {row['reason']}"


def _state(run: Run) -> str:
    said = run.progress
    if not said:
        if run.is_unreadable:
            return "could not be read"
        is_known = run.problems or run.numbers()
        return "" if is_known else "nothing was measured"
    epoch, last = real(said.get("epoch")), real(said.get("max_epochs"))
    step, steps = real(said.get("step")), real(said.get("max_steps"))
    done = f"epoch {show(epoch)}" + (f" of {show(last)}" if last is not None else "")
    done += f", step {show(step)}" + (f" of {show(steps)}" if steps is not None else "")
    if pace := real(said.get("steps_per_s")):
        done += f", {show(pace)} steps/s"
    how = str(said.get("state", "running"))
    why = f" ({said['error']})" if isinstance(said.get("error"), str) else ""
    return f"{how}{why}: {done}"


def _tone(run: Run) -> str:
    if not run.progress:
        return "" if run.report else "worse"
    return "" if run.progress.get("state") in ("running", "measuring") else "worse"


def _bytes(value: float) -> str:
    """Write bytes.

    >>> _bytes(679336), _bytes(12), _bytes(3 * 2**30)
    ('663 KiB', '12 B', '3 GiB')
    """
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:80] or "chart"
