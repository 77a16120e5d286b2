"""What a step keeps for backward under a budget, tried on copies, and what there is room for."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_accel.bridge.example import AtHand, StepFailed, batches_or, run_step
from lightning_accel.bridge.inert import inert_copy
from lightning_accel.errors import AccelError
from lightning_accel.measure.subject import localise_norms
from lightning_accel.memory.budget import activation_budget
from lightning_accel.memory.saved import SavedTensors, standing
from lightning_accel.memory.trial import compile_for_trial
from lightning_accel.surgery.preserve import preserve_rng


class BudgetTrial:
    """Runs the user's step on copies under a budget; all processes take part, and the fullest one counts."""

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        names: list[str],
        at_hand: AtHand | None,
    ) -> None:
        self._trainer, self._module, self._names = trainer, pl_module, names
        self._batch = batches_or(trainer, 1, at_hand)[0]

    def __call__(self, budget: float) -> float:
        """Return the bytes kept for backward; infinite where they do not fit."""
        return self.agree(self._bytes(budget), max)

    def agree(self, value: float, choose: Any) -> float:
        """Return the same on all processes."""
        return of_all(self._trainer, value, choose)

    def _bytes(self, budget: float) -> float:
        with preserve_rng(), inert_copy(self._trainer, self._module) as copy:
            localise_norms(copy)
            compile_for_trial(copy, self._names)
            try:
                with activation_budget(budget), SavedTensors() as saved:
                    output = run_step(self._trainer, copy, self._batch, 0)
            except StepFailed as error:
                if isinstance(error.__cause__, torch.OutOfMemoryError):
                    return math.inf
                raise AccelError(
                    "the activations could not be counted on a copy of the module",
                    str(error.__cause__),
                    "see the cause above; `ActivationCheckpointing` needs no trial",
                ) from error.__cause__
            del output
            return float(saved.count(standing(copy)))


def room(trainer: Trainer, pl_module: LightningModule) -> float:
    """Return how many bytes of CUDA memory activations may take."""
    device = trainer.strategy.root_device
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    learning = [p for p in pl_module.parameters() if p.requires_grad]
    to_come = sum(p.numel() * p.element_size() for p in learning if p.grad is None)
    for optimizer in trainer.optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not optimizer.state:  # two moments, as of Adam; less for others
            to_come += 2 * sum(p.numel() * p.element_size() for p in learning if id(p) in held)
    return 0.9 * free - to_come


def of_all(trainer: Trainer, value: float, choose: Any) -> float:
    """Return the same on all processes: what one chooses among the values of all."""
    if trainer.world_size == 1:
        return value
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return float(choose(gathered))
