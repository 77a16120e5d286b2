"""Masks in training: chosen single weights stay zero, through every step, prune and resume."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.pruning.mask.callback import WeightMasks

__all__ = ["WeightMasks"]


def __getattr__(name: str) -> Any:
    if name == "WeightMasks":
        from lightning_accel.pruning.mask.callback import WeightMasks

        return WeightMasks
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
