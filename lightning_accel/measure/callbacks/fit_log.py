"""What `AccelReport` writes down while a fit goes on: metrics by epoch, who did what when, and how far it is."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_accel.bridge.objective import is_brought
from lightning_accel.bridge.restore import pristine
from lightning_accel.bridge.technique import Technique
from lightning_accel.errors import explain
from lightning_accel.measure.journal import Journal, settings_of
from lightning_accel.measure.progress import Progress, thinned
from lightning_accel.measure.report import Report
from lightning_accel.measure.widths import widths
from lightning_accel.redact import redacted
from lightning_accel.surgery import Receipt

_PACKAGES = (
    *("torch", "lightning", "torchmetrics", "lightning-accel", "torch-pruning", "torchao"),
    *("numpy", "onnxruntime", "hydra-core", "wandb"),
)


class FitLog:
    """The log of one fit. Metrics stay tensors until somebody asks for numbers, so that no device is waited for.

    >>> FitLog().state_dict()
    {'history': {}, 'timeline': [], 'seconds': 0.0}
    """

    def __init__(self) -> None:
        self.history: dict[str, list[list[Any]]] = {}
        self.journal = Journal()
        self.progress: Progress | None = None
        self.device_peak_bytes: int | None = None
        self._held: dict[str, Any] = {}
        self._at = 0, 0
        self._has_told = False
        self._page: Path | None = None
        self._before_s = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Of training so far, those before a resume included."""
        return self._before_s + (0.0 if self._began is None else time.perf_counter() - self._began)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {
            "history": self._numbers(),
            "timeline": [dict(entry) for entry in self.journal.entries],
            "seconds": float(self.seconds),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one of an earlier version has none of this."""
        self.history = {n: [list(p) for p in v] for n, v in state.get("history", {}).items()}
        self.journal = Journal(state.get("timeline", ()))
        self._before_s = float(state.get("seconds", 0.0))

    def start(self, trainer: Trainer, path: Callable[[], Path]) -> None:
        """Begin, or go on; the file of progress is for the first process, and not for trials."""
        self.stop()
        self._began = time.perf_counter()
        self._held = dict(trainer.callback_metrics)
        is_written = trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        self.progress = None
        with self._told_once():  # what a user's logger says of its folder may be an error
            self.progress = Progress(path()) if is_written else None

    def stop(self) -> None:
        """Count no more seconds."""
        self._before_s, self._began = self.seconds, None

    def begin_epoch(self, trainer: Trainer) -> None:
        """Note what the epoch before logged: not at its own end, when the module may still log."""
        with self._told_once():
            self.collect(trainer, int(trainer.current_epoch))
            self._at = int(trainer.current_epoch), int(trainer.global_step)
            if trainer.current_epoch % _EVERY == 0:
                self._numbers()  # tensors on a device take more room than numbers

    def collect(self, trainer: Trainer, epoch: int) -> None:
        """Note what was logged since the last look, under the number of epochs that are done."""
        for name, value in trainer.callback_metrics.items():
            if self._held.get(name) is value or is_brought(trainer, name):
                continue
            self._held[name] = value
            points = self.history.setdefault(str(name), [])
            if points and points[-1][0] >= epoch:
                points.pop()
            points.append([epoch, value])

    def save(self, trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
        """Put into a checkpoint at the end of an epoch what that has logged."""
        states = checkpoint.get("callbacks", {})
        if key not in states or trainer.state.fn != "fit":
            return
        with self._told_once():
            if trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
                self.collect(trainer, int(trainer.current_epoch) + 1)
                states[key]["log"] = self.state_dict()

    def look(self, trainer: Trainer) -> None:
        """Note what techniques did since the last look."""
        at = {"epoch": int(trainer.current_epoch), "step": int(trainer.global_step)}
        with self._told_once():
            for name, key, part in _parts(trainer):
                receipt = getattr(part, "receipt", None)
                receipt = receipt if isinstance(receipt, Receipt) else _NOTHING
                told = partial(_settings, part)
                self.journal.look(name, receipt, **at, settings=told, key=key)

    def is_due(self) -> bool:
        """Whether the file of progress is to be written."""
        return self.progress is not None and self.progress.is_due()

    def tell(self, trainer: Trainer, state: str = "running", **more: Any) -> None:
        """Write the file of progress; where that fails it is said once, and the fit goes on."""
        try:
            self._write(trainer, state, **more)
        except Exception as error:
            self.progress = None
            rank_zero_warn(
                explain(
                    "the progress of this fit cannot be written for `lightning-accel board`",
                    f"{type(error).__name__}: {error}",
                    "nothing for this training; make the folder writable to see it while it goes on",
                )
            )

    def tell_of(self, trainer: Trainer, error: BaseException) -> None:
        """Say that the fit was ended by an error, or by its user."""
        self.stop()
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.tell(trainer, state, error=type(error).__name__)

    @contextmanager
    def _told_once(self) -> Iterator[None]:
        """Let no error of ours end a fit."""
        try:
            yield
        except Exception as error:
            if not self._has_told:
                self._has_told = True
                rank_zero_warn(
                    explain(
                        "something of this fit is missing in its report",
                        f"{type(error).__name__}: {error}",
                        "nothing for this training; please report this",
                    )
                )

    def _write(self, trainer: Trainer, state: str, **more: Any) -> None:
        if self.progress is None:
            return
        batches = trainer.num_training_batches
        self.progress.write(
            {
                "state": state,
                "updated": time.time(),
                "seconds": round(self.seconds, 3),
                "epoch": int(trainer.current_epoch),
                "max_epochs": trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None,
                "step": int(trainer.global_step),
                "max_steps": trainer.max_steps if trainer.max_steps > 0 else None,
                "batches": batches if isinstance(batches, int) else None,
                **more,
                "history": {name: thinned(points) for name, points in self._numbers().items()},
                "timeline": self.journal.entries,
            }
        )

    def end(self, trainer: Trainer) -> None:
        """Take a last look, when the fit has ended and before anything is measured."""
        self.stop()
        at = int(trainer.current_epoch), int(trainer.global_step)
        is_within = at[0] == self._at[0] and at[1] > self._at[1]  # an epoch that was begun counts
        with self._told_once():
            self.collect(trainer, at[0] + is_within)
        self.look(trainer)
        device = trainer.strategy.root_device
        self.tell(trainer, "measuring")
        known = device.type == "cuda" and torch.cuda.is_initialized()
        self.device_peak_bytes = torch.cuda.max_memory_allocated(device) if known else None

    def leave(self) -> None:
        """Take the file of progress away, where a report stands in its place."""
        if self.progress is not None:
            self.progress.end()

    def write_page(self, report: Path) -> None:
        """Write the page of a report, or write it anew."""
        from lightning_accel.pages import write_page

        is_new = self._page is None
        self._page = write_page(report, self._page)
        if is_new:
            rank_zero_info(f"Wrote {self._page}")

    def fill(self, report: Report, trainer: Trainer) -> None:
        """Put all that was written down into a report."""
        report.extra["schema"] = 2
        report.extra["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        report.extra["fit"] = {
            "seconds": round(self.seconds, 3),
            "epochs": int(trainer.current_epoch),
            "steps": int(trainer.global_step),
        }
        report.extra["timeline"] = self.journal.entries
        report.extra["history"] = self._numbers()
        report.extra["environment"] = {
            "platform": platform.platform(),
            "strategy": type(trainer.strategy).__name__,
            "packages": dict(_versions()),
        }
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            found: Any = getattr(callback, "report", None)
            if hasattr(found, "waterfall") and hasattr(found, "to_dict"):  # a tuner's
                report.extra["tuning"] = found.to_dict()

    def fill_sizes(self, report: Report, pl_module: LightningModule) -> None:
        """Put layers and memory into a report, while the module is whole."""
        dense = pristine(pl_module).tensors
        report.extra["widths"] = widths(dense, pl_module)
        report.extra["memory"] = {
            "host_peak_bytes": _host_peak(),
            "device_peak_bytes": self.device_peak_bytes,
        }

    def _numbers(self) -> dict[str, list[list[Any]]]:
        for points in self.history.values():
            for point in points:
                point[1] = _number(point[1])
        return {name: [list(p) for p in points] for name, points in self.history.items()}


_NOTHING = Receipt()
_EVERY = 64


def _number(value: Any) -> float | None:
    """Return a metric as a number; what a callback put among metrics may be anything."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _settings(part: Any) -> dict[str, Any]:
    clean: dict[str, Any] = redacted(settings_of(part))
    return clean


def _parts(trainer: Trainer) -> Iterator[tuple[str, str, Any]]:
    """Yield what of ours takes part, each with a name and a key of its own."""
    beside: Any = (trainer.precision_plugin, trainer.strategy)
    ours = [part for part in beside if _is_ours(part)]
    ours += [c for c in trainer.callbacks if isinstance(c, Technique) or _is_ours(c)]  # type: ignore[attr-defined]
    counts: dict[str, int] = {}
    for part in ours:
        name = type(part).__name__
        counts[name] = counts.get(name, 0) + 1
        yield name, f"{name} {counts[name]}", part


def _is_ours(part: Any) -> bool:
    home, _, inner = type(part).__module__.partition(".")
    if home != "lightning_accel" or inner.split(".")[0] in ("measure", "bridge", "attach"):
        return False
    return not isinstance(part, Callback) or hasattr(part, "receipt") or inner.startswith("export")


def _host_peak() -> int | None:
    """Return the most memory that this process ever held, in bytes; no system but Unix tells."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
