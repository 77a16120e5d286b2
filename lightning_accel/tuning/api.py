"""`tune(module, data)`: what would make this module train faster here, without training it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from typing_extensions import override

from lightning_accel.arguments import instance, whole
from lightning_accel.bridge.data import unread
from lightning_accel.errors import AccelError
from lightning_accel.surgery import twin
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.tuning.arguments import readable
from lightning_accel.tuning.callbacks.auto_tune import AutoTune
from lightning_accel.tuning.report import TuneReport


def tune(
    module: LightningModule,
    data: Any,
    *,
    numerics: str = "amp",
    budget_s: float = 60.0,
    steps: int | None = None,
    techniques: Collection[str] | str | None = None,
    batch_sizes: Sequence[int] = (),
    cache: bool | str | Path = True,
    **trainer: Any,
) -> TuneReport:
    """Measure on copies of `module` what makes its training step faster here, and prove what each gave.

    Neither the module, its data nor the process are changed. Use the answer by
    `Trainer(**report.trainer_arguments())`, or as a preset: `report.save("tuned.yaml")`.

    Args:
        module: The module, as one would train it.
        data: What `Trainer.fit` takes: a DataLoader, several, or a LightningDataModule.
        numerics: "exact", "amp" or "low", see `AutoTune`.
        budget_s: About how many seconds to search.
        steps: How many batches will be trained, against which compiling is charged; by default as many as a
            Trainer with these arguments would train.
        techniques: What to try; all by default.
        batch_sizes: Batch sizes to measure as well.
        cache: Folder of earlier answers; `True` is the user's cache folder, `False` searches anew.
        trainer: Arguments of the Trainer that it is for, such as `gradient_clip_val`, `precision`,
            `accumulate_grad_batches` and `accelerator`.

    Raises:
        TypeError: `module` is no LightningModule, or `data` nothing to read.
        AccelError: The training step cannot be repeated on a copy.

    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> model = BoringModel()
    >>> report = tune(model, model.train_dataloader(), techniques="memory_format", cache=False, budget_s=2)
    >>> report.settings.label, report.trials[0].reason
    ('plain', 'no two-dimensional convolution')
    """
    instance("module", module, LightningModule, "a LightningModule", "pass one to tune")
    readable(data)
    tuning = AutoTune(
        numerics=numerics,
        budget_s=budget_s,
        budget_share=float("inf"),
        techniques=techniques,
        batch_sizes=batch_sizes,
        cache=cache,
    )
    if steps is not None:
        tuning.steps = whole("steps", steps)
    quiet: dict[str, Any] = {
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if not trainer.keys() & {"max_epochs", "max_steps", "max_time"}:
        quiet["max_epochs"] = 1000  # what Lightning takes, with a warning
    return tune_in(Trainer(**{**quiet, **trainer}), module, data, tuning)


def tune_in(trainer: Trainer, module: LightningModule, data: Any, tuning: AutoTune) -> TuneReport:
    """Tune a copy of `module` in a Trainer of one's own, which is not to be used afterwards.

    Args:
        trainer: A fresh Trainer; its loggers and checkpoints are taken off.
        module: The module, which stays as it is.
        data: What `Trainer.fit` takes.
        tuning: How to tune.
    """
    trainer.loggers = []
    edits = [c for c in trainer.callbacks if not isinstance(c, (Checkpoint, ProgressBar))]  # type: ignore[attr-defined]
    trainer.callbacks = [*edits, tuning, _NoTraining()]  # type: ignore[attr-defined]
    trainer.num_sanity_val_steps = 0
    tuning.only_report = True
    with preserve_rng(module), unread(data):  # a Trainer reads ahead before its first hook
        trainer.fit(twin(module), data)
    if tuning.report is None:
        raise AccelError(
            "there is no training batch to measure",
            f"{trainer.num_training_batches} batches, max_epochs={trainer.max_epochs}, "
            f"max_steps={trainer.max_steps}, fast_dev_run={bool(trainer.fast_dev_run)}",  # type: ignore[attr-defined]
            "pass data, and arguments of a Trainer that trains",
        )
    return tuning.report


class _NoTraining(Callback):
    """Ends a fit before its first batch."""

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.fit_loop.max_epochs = 0
