"""The state of a whole fit, and the way back to it in mid-training.

The counterpart of `model_edit.commit`: that goes to a smaller network, this back to a larger one.
"""

from __future__ import annotations

import gc
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lightning_accel.bridge import bests
from lightning_accel.bridge.beside import Cuts
from lightning_accel.bridge.model_edit import forget_sizes, tell
from lightning_accel.bridge.optimizers import hidden_beside, optimizers_of, shadows_of
from lightning_accel.bridge.parts import PartState, parts_of
from lightning_accel.bridge.restore import averages, pristine
from lightning_accel.surgery import Receipt, Structure
from lightning_accel.surgery.dropped import Dropped
from lightning_accel.surgery.rng import random_state
from lightning_accel.surgery.snapshot import Snapshot


def remember_fit(trainer: Trainer, pl_module: LightningModule) -> Snapshot:
    """Copy the state of a fit at a step boundary; on all processes, each with all random states."""
    return Snapshot.take(
        pl_module,
        pristine=pristine(pl_module),
        copies=averages(trainer.callbacks, pl_module),  # type: ignore[attr-defined]
        holders=_holders(trainer, pl_module),
        random=_of_all_processes(trainer, random_state()),
    )


def rewind(trainer: Trainer, pl_module: LightningModule, snapshot: Snapshot) -> Receipt:
    """Put a fit back at a step boundary, and let everyone who holds the model know."""
    tell(trainer, "on_model_edit_start", pl_module)
    strategy = trainer.strategy
    wrapped = isinstance(strategy, DDPStrategy) and strategy.model is not pl_module
    if wrapped:
        strategy.model = pl_module
        gc.collect()  # the old wrapper's gradient accumulators know the old shapes
    copies = list(averages(trainer.callbacks, pl_module))  # type: ignore[attr-defined]
    parts = [part for part in parts_of(trainer, pl_module) if part.at is None]
    before = Structure(bypassed=pristine(pl_module).updated(snapshot.structure).bypassed)
    blocks = before.apply(pl_module)  # so that holders are those of all
    for part in parts:
        part.take_blocks(before)
    Dropped(pl_module).put_in()
    receipt = blocks + snapshot.restore(
        pl_module,
        pristine=pristine(pl_module),
        copies=copies,
        holders=_holders(trainer, pl_module),
    )
    if wrapped:
        strategy.configure_ddp()  # type: ignore[attr-defined]
    forget_sizes(pl_module)
    bests.taken_back(trainer)
    tell(trainer, "on_model_edit_end", pl_module, receipt)
    snapshot.restore_random(trainer.global_rank)  # last: what went before may have drawn numbers
    return receipt


def _holders(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    hidden = hidden_beside(trainer, pl_module)
    optimizers = optimizers_of(trainer, pl_module, hidden)
    found: dict[str, Any] = {f"optimizer{i}": o for i, o in enumerate(optimizers)}
    found["cuts"] = Cuts(pl_module)
    found["shadows"] = shadows_of(trainer, pl_module, hidden)
    for part in parts_of(trainer, pl_module):
        if part.at is None:
            found[part.where] = PartState(pl_module, part)
    found.update(bests.keepers(trainer))
    for i, config in enumerate(trainer.lr_scheduler_configs):
        found[f"scheduler{i}"] = config.scheduler
    for i, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        for held in (callback, *vars(callback).values()):
            if isinstance(getattr(held, "n_averaged", None), Tensor):
                found[f"average{i}"] = _NumAveraged(held)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return found if scaler is None else {**found, "scaler": scaler}


class _NumAveraged:
    """How many networks a weight average holds, which is the weight of the next one."""

    def __init__(self, average: Any) -> None:
        self.average = average

    def state_dict(self) -> dict[str, Tensor]:
        return {"n_averaged": self.average.n_averaged}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.average.n_averaged.copy_(state["n_averaged"])


def _of_all_processes(trainer: Trainer, value: Any) -> list[Any]:
    if trainer.world_size == 1:
        return [value]
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return gathered
