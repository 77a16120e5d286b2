"""The user's own network as one side of a report: what a precision or a memory format of ours did to it is undone."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_accel.measure.subject import Runnable, localise_norms
from lightning_accel.surgery import Receipt, Stage
from lightning_accel.surgery.call import Call


def dense_side(trainer: Trainer, dense: LightningModule, calls: tuple[Call, ...]) -> Runnable:
    """Return how to run the dense network, given a copy of it.

    Beside a precision of ours it computes in float32, and so on inputs that another part made in a short format too.
    """
    localise_norms(dense)
    params = dict(dense.named_parameters())
    for name in _reformatted(trainer):
        if name in params:
            params[name].data = params[name].data.contiguous()
    plugin = trainer.precision_plugin
    if getattr(plugin, "accel_baseline", None) == "32-true":
        whole = tuple(c._replace(args=_long(c.args), kwargs=_long(c.kwargs)) for c in calls)
        return Runnable(dense, dense, whole)
    return Runnable(dense, dense, calls, plugin.forward_context, plugin.train_step_context)


def _long(values: Any) -> Any:
    short = (torch.float16, torch.bfloat16)

    def cast(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype in short else value

    return tree_map(cast, values)


def _reformatted(trainer: Trainer) -> set[str]:
    """Return the weights whose memory format an edit of ours changed."""
    edits = [c for c in trainer.callbacks if getattr(c, "stage", None) == Stage.MEMORY]  # type: ignore[attr-defined]
    receipts = [
        edit.receipt for edit in edits if isinstance(getattr(edit, "receipt", None), Receipt)
    ]
    return {change.name for receipt in receipts for change in receipt.changes}
