"""What a training step keeps for its backward: measured, and made less by recomputing."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily
from lightning_accel.memory.budget import activation_budget
from lightning_accel.memory.checkpoint import (
    checkpoint_activations,
    find_repeated,
    keep_activations,
)
from lightning_accel.memory.saved import saved_bytes

if TYPE_CHECKING:
    from lightning_accel.memory.callbacks.activation_budget import ActivationBudget
    from lightning_accel.memory.callbacks.activation_checkpointing import ActivationCheckpointing

__all__ = [
    "ActivationBudget",
    "ActivationCheckpointing",
    "activation_budget",
    "checkpoint_activations",
    "find_repeated",
    "keep_activations",
    "saved_bytes",
]


__getattr__ = lazily(
    __name__,
    {
        "ActivationBudget": "callbacks.activation_budget",
        "ActivationCheckpointing": "callbacks.activation_checkpointing",
    },
)
