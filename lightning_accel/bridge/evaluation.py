"""Batches of validation, test and prediction, told by one hook each."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class EvaluationBatches(Callback):
    """A callback to which a batch that is not trained on is the same in each stage."""

    def on_evaluation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, dataloader_idx: int
    ) -> None:
        """Called before a batch of validation, test or prediction."""

    def on_evaluation_batch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after one."""

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.on_evaluation_batch_start(trainer, pl_module, dataloader_idx)

    @override
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any
    ) -> None:
        self.on_evaluation_batch_end(trainer, pl_module)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
