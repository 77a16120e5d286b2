"""What a guarded prune needs of a fit: that it can be judged, the way back, and what is told at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_accel.bridge.rewind import rewind
from lightning_accel.bridge.strategies import on_whole
from lightning_accel.errors import AccelError, explain
from lightning_accel.pruning import history as past
from lightning_accel.pruning.rollback import Rollback
from lightning_accel.surgery import Receipt


def require_one_guard(trainer: Trainer, pruning: Any) -> None:
    """Raise where another prune could be taken back with the guarded one: the fit is put back as a whole.

    Raises:
        AccelError: There are several, and one has a guard.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    alike = [one for one in callbacks if isinstance(one, type(pruning))]
    if len(alike) > 1 and any(one.guard is not None for one in alike):
        raise AccelError(
            "a prune that is taken back puts the whole fit back, and with it what others have pruned since",
            f"{len(alike)} {type(pruning).__name__}, one with `max_drop`",
            "use one of them with `select=[...]` for all of the layers, or none with `max_drop`",
        )


def require_validation(trainer: Trainer, monitor: str, first: int) -> None:
    """Raise where no validation can come before the first prune.

    Args:
        trainer: At the start of training.
        monitor: The metric that is waited for.
        first: Epoch of the first prune.

    Raises:
        AccelError: There is none at all, or not in so many epochs.
    """
    every, batches = trainer.check_val_every_n_epoch, trainer.num_training_batches
    found, until = "", trainer.val_check_batch or 0
    if not trainer.enable_validation:
        found = "no validation in this fit"
    elif every is not None and every > first:
        found = f"a validation every {every} epochs, and a prune before epoch {first}"
    elif every is None and until > first * batches:
        found = f"a validation every {until} batches, and a prune after {first * batches}"
    if found and not trainer.fit_loop.restarting:
        raise AccelError(
            f"`{monitor}` has no value from before the first prune",
            found,
            "validate earlier, or prune later",
        )


def is_last_epoch(trainer: Trainer) -> bool:
    """Whether this is the last epoch in which something is trained: after it SWA may need one for batch norms."""
    last = trainer.max_epochs
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, StochasticWeightAveraging) and one._model_contains_batch_norm:
            last = one._max_epochs
    return last is not None and trainer.current_epoch + 1 == last


@on_whole
def take_back(
    trainer: Trainer, pl_module: LightningModule, guard: Rollback, told: Callable[[str], None]
) -> Receipt:
    """Take the last prune back, and the metrics of the smaller network with it."""
    assert guard.snapshot is not None
    told(f"The prune before epoch {guard.pruned_at} is taken back: {guard.describe()}.")
    metrics = trainer._logger_connector._callback_metrics
    metrics.update({name: torch.as_tensor(value) for name, value in guard.metrics.items()})
    receipt = rewind(trainer, pl_module, guard.snapshot)
    guard.seen, guard.latest = trainer.callback_metrics.get(guard.monitor), None
    return receipt


def tell_end(guard: Rollback, history: Sequence[past.Entry], is_search: bool) -> None:
    """Tell at the end of a fit what a search has seen, and what is not as it was asked for."""
    if is_search and not history:
        rank_zero_warn("The fit ended before the first step of the search, and nothing is pruned.")
    points = past.trade_off(history, guard.first, guard.mode)
    if is_search and points:
        rank_zero_info(past.describe(points, guard.monitor, history))
    if past.standing(history) and guard.ends_outside():
        rank_zero_warn(
            explain(
                "the network is worse at the end than when its last prune passed",
                f"{guard.describe()}, with max_drop={guard.max_drop}",
                "take an earlier checkpoint, or train on",
            )
        )
