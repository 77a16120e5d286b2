"""Structured pruning: remove whole channels, so that the network is really smaller."""

from typing import TYPE_CHECKING, Any

from lightning_accel.pruning.prune import plan, prune
from lightning_accel.pruning.recalibrate import recalibrate

if TYPE_CHECKING:
    from lightning_accel.pruning.callback import StructuredPruning

__all__ = ["StructuredPruning", "plan", "prune", "recalibrate"]


def __getattr__(name: str) -> Any:
    if name == "StructuredPruning":
        from lightning_accel.pruning.callback import StructuredPruning

        return StructuredPruning
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
