"""What a Trainer's loggers get of a report: numbers, on W&B a table and a chart, and when asked files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from lightning_accel.measure.dashboard import to_artifact, to_wandb
from lightning_accel.measure.report import Report


def log(trainer: Trainer, report: Report) -> None:
    """Give the numbers to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(report.flat(), step=trainer.global_step)
        if _is_wandb(logger):
            to_wandb(logger, report, trainer.global_step)


def hand_over(trainer: Trainer, report: Report, saved_at: Path) -> None:
    """Keep the report, the best checkpoint or the last, and bundles with the run on W&B."""
    saver: Any = trainer.checkpoint_callback
    names = ("best_model_path", "last_model_path")
    kept = [path for name in names if (path := getattr(saver, name, ""))][:1]
    bundles = [getattr(getattr(c, "bundle", None), "path", None) for c in trainer.callbacks]  # type: ignore[attr-defined]
    files = [Path(path) for path in (saved_at, *kept, *bundles) if path and Path(path).exists()]
    for logger in filter(_is_wandb, trainer.loggers):
        to_artifact(logger, report, files)


def _is_wandb(logger: Any) -> bool:
    return any(base.__name__ == "WandbLogger" for base in type(logger).__mro__)
