"""The pace of a training while it goes on: `StepMeter`."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_accel.arguments import whole
from lightning_accel.bridge.objective import bring
from lightning_accel.bridge.paced import Paced
from lightning_accel.measure.subject import num_samples


class StepMeter(Paced):
    """Log `measure/steps_per_s` and `measure/samples_per_s` without ever waiting for the device.

    Each value covers the steps since the one before. Warm-up, compilation after an edit, validation,
    checkpoints and the change of epochs are left out. Samples are those of all processes that train
    on data of their own.

    Args:
        every_n_steps: Optimizer steps between two values; the Trainer's `log_every_n_steps` if `None`.

    Raises:
        ValueError: `every_n_steps` is below 1.

    >>> StepMeter(every_n_steps=10).every_n_steps
    10
    """

    brings: ClassVar[tuple[str, ...]] = ("measure/steps_per_s", "measure/samples_per_s")

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        self.every_n_steps = whole("every_n_steps", every_n_steps, none=True)
        self.last: dict[str, float] = {}
        self._next = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._next = self._following(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._global_step >= self._next:
            self._next = self._following(trainer)
            self._log(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.last:  # a fit shorter than one interval
            self._log(trainer)
        bring(trainer, self.last)

    @override
    def _samples(self, batch: Any) -> int:
        return num_samples(batch) or 0

    def _following(self, trainer: Trainer) -> int:
        every = self.every_n_steps or trainer.log_every_n_steps or 50  # type: ignore[attr-defined]
        return (trainer.global_step // every + 1) * every

    def _log(self, trainer: Trainer) -> None:
        if self.pace.steps_per_s is None:
            return
        self.last = {"measure/steps_per_s": self.pace.steps_per_s}
        if self.pace.samples_per_s is not None:
            self.last["measure/samples_per_s"] = self.pace.samples_per_s * _num_shards(trainer)
        self.pace.clear()
        # Not `self.log`, which costs a fifth of a millisecond on every step.
        for logger in trainer.loggers:
            logger.log_metrics(self.last, step=max(trainer.global_step - 1, 0))


def _num_shards(trainer: Trainer) -> int:
    """Return how many processes train on data of their own."""
    shards = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
    return int(shards.get("num_replicas", 1))
