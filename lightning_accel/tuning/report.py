"""What a tuner found: as a table, as JSON, as a picture, and as a preset that Hydra takes.

>>> report = TuneReport(Settings(precision="bf16-mixed"), bars=[WaterfallStep("plain", 8.0), WaterfallStep("+ bf16", 4.0, 2.0)])
>>> report.ratio
2.0
>>> report.trainer_arguments()["callbacks"][0].plugin
AutocastPrecision('bf16-mixed')
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

from lightning_accel.errors import explain
from lightning_accel.measure.table import Table, finite
from lightning_accel.pages.charts import bars
from lightning_accel.pages.drawing import Drawing
from lightning_accel.pages.plots import save
from lightning_accel.places import is_there, replace, starts_with
from lightning_accel.tuning.numerics import check
from lightning_accel.tuning.settings import Settings, make

FORMAT = 2
"""The version of `to_dict`'s form; files of another version are not read."""


_RACES = (
    "gain: what was taken, over the step before it in the race of all side by side; all else in a race with "
    "the best so far; loading with batch and step together"
)


class Trial(NamedTuple):
    """One value of one technique against the best so far.

    `verdict` is "taken", "not taken", "rejected" (it computes something else), "failed" or "skipped".
    """

    technique: str
    value: str
    verdict: str
    reason: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    compile_s: float | None = None
    pays_after_steps: int | None = None


class WaterfallStep(NamedTuple):
    """One step of the waterfall: milliseconds per step, gain over plain with its interval, gain over the last."""

    label: str
    step_ms: float
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0
    step_ratio: float = 1.0


class BatchRate(NamedTuple):
    """One batch size: samples per second under the chosen settings, or why there are none."""

    batch_size: int
    samples_per_s: float | None
    reason: str = ""


@dataclass
class TuneReport:
    """The outcome of `tune`.

    Args:
        settings: What to use.
        bars: The waterfall, plain first.
        trials: Every value with its verdict.
        rates: Batch sizes, if asked for.
        resolution: Plain against plain, with its interval: what lies within is no difference here.
        steps: The length of the run that compilation was charged against.
        numerics: The tier that was allowed.
        seconds: What the search took.
        cached: Whether the answer came from an earlier search.
        about: Hardware and versions.
        notes: What else a reader should know.
    """

    settings: Settings = field(default_factory=Settings)
    bars: Sequence[WaterfallStep] = ()
    trials: Sequence[Trial] = ()
    rates: Sequence[BatchRate] = ()
    resolution: tuple[float, float, float] = (1.0, 1.0, 1.0)
    steps: int = 0
    numerics: str = "amp"
    seconds: float = 0.0
    cached: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def ratio(self) -> float:
        """How many times as fast as plain a training step is."""
        return self.bars[-1].ratio if self.bars else 1.0

    @property
    def step_ms(self) -> float:
        """Milliseconds of a plain training step."""
        return self.bars[0].step_ms if self.bars else 0.0

    def trainer_arguments(self) -> dict[str, list[Any]]:
        """Return fresh callbacks of the settings, to pass to a Trainer."""
        return {"callbacks": [make(node) for node in self.settings.nodes().values()]}

    def waterfall(self) -> Table:
        """Return what each technique added."""
        rows = [
            [
                b.label,
                b.step_ms,
                _times(b.ratio),
                f"{b.low:.2f} to {b.high:.2f}",
                _times(b.step_ratio),
            ]
            for b in self.bars
        ]
        ratio, low, high = self.resolution
        notes = [f"plain against plain: {ratio:.2f}x ({low:.2f} to {high:.2f})", *self.notes]
        title = f"A training step is {self.ratio:.2f}x as fast with: {self.settings.label}"
        return Table(["", "ms", "of plain", "95 % interval", "of the last"], rows, title, notes)

    def table(self) -> Table:
        """Return every value that was considered, with its verdict."""
        rows: list[list[Any]] = [
            [
                t.technique.replace("_", " "),
                t.value.replace("_", " "),
                t.verdict,
                _times(t.ratio),
                None if t.low is None or t.high is None else f"{t.low:.2f} to {t.high:.2f}",
                t.compile_s and round(t.compile_s, 1),
                t.pays_after_steps,
                t.reason,
            ]
            for t in self.trials
        ]
        columns = ["technique", "value", "verdict", "gain", "95 % interval"]
        columns += ["compile s", "pays after", "why"]
        title = f"Considered, numerics={self.numerics!r}, {self.seconds:.0f} s"
        return Table(columns, rows, title, [_RACES] if self.trials else [])

    def to_text(self) -> str:
        """Render for a terminal or a log."""
        if not self.bars:
            return "\n".join(self.notes)
        tables = [self.waterfall(), self.table()]
        if self.rates:
            rows = [[r.batch_size, r.samples_per_s, r.reason] for r in self.rates]
            tables.append(Table(["batch size", "samples/s", ""], rows, "Batch sizes"))
        return "\n\n".join(table.to_text(width=120) for table in tables)

    def _repr_html_(self) -> str:
        """Show it in a notebook: the waterfall, and everything that was tried."""
        if not self.bars:
            return Table([""], [[note] for note in self.notes], "Not tuned").to_html()
        return f"{self.waterfall().to_html()}\n{self.table().to_html()}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        return {
            "format": FORMAT,
            "settings": self.settings.to_dict(),
            "ratio": finite(self.ratio),
            "bars": [finite(bar._asdict()) for bar in self.bars],
            "trials": [finite(trial._asdict()) for trial in self.trials],
            "rates": [finite(rate._asdict()) for rate in self.rates],
            "resolution": finite(list(self.resolution)),
            "steps": self.steps,
            "numerics": self.numerics,
            "seconds": self.seconds,
            "about": dict(self.about),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TuneReport:
        """Read `to_dict`'s form.

        Raises:
            ValueError: It is of another version, or damaged.
        """
        try:
            if plain["format"] != FORMAT:
                raise ValueError(f"format {plain['format']!r}")
            for key in ("settings", "about"):
                if not isinstance(plain[key], Mapping):
                    raise TypeError(f"{key} is {plain[key]!r}")
            ratio, low, high = (float(value) for value in plain["resolution"])
            return cls(
                Settings.from_dict(plain["settings"]),
                [_read(WaterfallStep, bar) for bar in plain["bars"]],
                [_read(Trial, trial) for trial in plain["trials"]],
                [_read(BatchRate, rate) for rate in plain["rates"]],
                (ratio, low, high),
                int(plain["steps"]),
                check(plain["numerics"]),
                float(plain["seconds"]),
                about=dict(plain["about"]),
                notes=[str(note) for note in list(plain["notes"])],
            )
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                explain(
                    "this is no report of a tuner", f"{type(error).__name__}: {error}", "tune anew"
                )
            ) from None

    def to_json(self) -> str:
        """Render as JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_svg(self) -> str:
        """Draw the waterfall."""
        return self.picture().to_svg()

    def picture(self) -> Drawing:
        """Return the waterfall as a drawing."""
        panels = {
            "ms per training step": [bar.step_ms for bar in self.bars],
            "times as fast as plain": [bar.ratio for bar in self.bars],
        }
        title = f"{self.ratio:.2f}x: {self.settings.label}"
        return bars([bar.label for bar in self.bars], panels, title=title)

    def to_yaml(self) -> str:
        """Render as a preset: `+accel=./tuned.yaml`, or a file in `conf/accel` of an app."""
        import yaml

        callbacks = self.settings.nodes()
        preset = {"callbacks": callbacks} if callbacks else {}
        known = [str(self.about[key]) for key in ("device", "torch") if key in self.about]
        where = " ".join(", ".join(known).split())  # one line, whatever a device calls itself
        head = [
            "# @package _global_",
            f"# Tuned: {self.settings.label}, {self.ratio:.2f}x as fast as plain ({where}).",
        ]
        body = yaml.safe_dump(preset, sort_keys=False) if preset else "{}\n"
        return "\n".join(head) + "\n" + body

    def save(self, path: str | Path) -> Path:
        """Write one file, whose ending decides the form: .yaml, .json, .svg, .png, .pdf, .md or .txt.

        Raises:
            ValueError: Another ending.
            AccelError: A picture that is no SVG, and no matplotlib.
        """
        path = Path(path)
        forms = {
            ".yaml": self.to_yaml,
            ".yml": self.to_yaml,
            ".json": self.to_json,
            ".svg": self.to_svg,
            ".txt": self.to_text,
            ".md": lambda: f"{self.waterfall().to_markdown()}\n\n{self.table().to_markdown()}\n",
        }
        if path.suffix in (".png", ".pdf"):
            return save(self.picture(), path)
        if path.suffix not in forms:
            known = ", ".join([*forms, ".png", ".pdf"])
            raise ValueError(
                explain("unknown form of a report", repr(str(path)), f"end in {known}")
            )
        replace(path, forms[path.suffix]())
        return path

    @staticmethod
    def is_free(path: Path) -> bool:
        """Whether `save` would overwrite nothing here but an earlier report."""
        return not is_there(path) or starts_with(path, _STARTS.get(path.suffix, "(?!)"))


_YAML = r"# @package _global_\n# Tuned: "
_STARTS = {
    ".yaml": _YAML,
    ".yml": _YAML,
    ".json": r'\{\s*"format": \d+,\s*"settings": ',
    ".svg": r"<svg [^>]*>\s*<(title>|rect [^>]*>\s*<text [^>]*>)\d+\.\d\dx: ",
    ".md": r"\*\*A training step is ",
    ".txt": r"A training step is |not tuned: ",
}
"""How each form of a report begins."""

RowT = TypeVar("RowT", WaterfallStep, Trial, BatchRate)


def _read(kind: type[RowT], row: Any) -> RowT:
    """Make a row of plain values, each of the type that it is declared to have."""
    hints = get_type_hints(kind)
    values = {str(name): value for name, value in dict(row).items()}
    for name, value in values.items():
        allowed = get_args(hints[name]) or (hints[name],)
        whole = float in allowed and isinstance(value, int) and not isinstance(value, bool)
        if not whole and type(value) not in allowed:
            raise TypeError(f"{kind.__name__}.{name} is {value!r}")
    return kind(**values)


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f}x"
