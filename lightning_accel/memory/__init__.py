"""What a training step keeps for its backward: measured, and made less by recomputing."""

from typing import TYPE_CHECKING, Any

from lightning_accel.memory.budget import activation_budget
from lightning_accel.memory.checkpoint import (
    checkpoint_activations,
    find_repeated,
    keep_activations,
)
from lightning_accel.memory.saved import saved_bytes

if TYPE_CHECKING:
    from lightning_accel.memory.callback import ActivationBudget, ActivationCheckpointing

__all__ = [
    "ActivationBudget",
    "ActivationCheckpointing",
    "activation_budget",
    "checkpoint_activations",
    "find_repeated",
    "keep_activations",
    "saved_bytes",
]


def __getattr__(name: str) -> Any:
    if name in ("ActivationBudget", "ActivationCheckpointing"):
        from lightning_accel.memory import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
