"""The pace of a fit, read from its hooks, and where its report goes."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_accel.measure.timing import Pace
from lightning_accel.places import free
from lightning_accel.surgery import Receipt


class Paced(Callback):
    """Feeds a `Pace` from the hooks of a fit; validation, checkpoints and edits do not count.

    A step is an optimizer step, as in `trainer.global_step`: with four accumulated batches it takes
    four of them.
    """

    def __init__(self) -> None:
        self.pace = Pace()
        self._global_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pace.restart()
        self._global_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now, step = time.perf_counter(), trainer.global_step
        samples = self._samples(batch)
        self.pace.tick(steps=step - self._global_step, samples=samples, now=now)
        self._global_step = step

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pace.pause()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pace.pause()

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.pace.pause()

    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        self.pace.restart()

    def _samples(self, batch: Any) -> int:
        return 0


_written: set[Path] = set()


def place_of_report(trainer: Trainer, named: Path | None, is_free: Callable[[Path], bool]) -> Path:
    """Return where a fit writes its report: the name that was given, or else one that no earlier fit of this process has.

    Args:
        trainer: Of the fit.
        named: The user's own name, whose earlier report is replaced.
        is_free: Whether writing there replaces nothing but a report.
    """
    found = named or report_path(trainer)
    folders = (found.parent / f"fit_{number}" for number in itertools.count(2))
    places = itertools.chain([found], (folder / found.name for folder in folders))
    path = free(next(p for p in places if named or p.absolute() not in _written), is_free)
    if path.absolute() in _written:
        rank_zero_info(f"The report of an earlier fit of this process is replaced: {path}")
    _written.add(path.absolute())
    return path


def report_path(trainer: Trainer) -> Path:
    """Return where this fit's logs go, as `ModelCheckpoint` finds it; never just the working folder."""
    root = Path(trainer.default_root_dir)
    if not trainer.loggers:
        working = root.absolute() == Path.cwd()
        root = _folder_of_job() or Path(root, "lightning_logs") if working else root
        return root / "report.json"
    first = trainer.loggers[0]
    if first.log_dir is not None:
        return Path(first.log_dir, "report.json")
    version = first.version if isinstance(first.version, str) else f"version_{first.version}"
    return Path(first.save_dir or root, str(first.name), version, "report.json")


def _folder_of_job() -> Path | None:
    """Return the folder of the Hydra job that is running, if one is."""
    if "hydra" not in sys.modules:
        return None
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir) if HydraConfig.initialized() else None
