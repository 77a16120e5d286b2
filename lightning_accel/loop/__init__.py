"""Less host time per step: lean logging, fewer waits, and optimizers in one kernel."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily
from lightning_accel.loop.fused import use_implementation

if TYPE_CHECKING:
    from lightning_accel.loop.callbacks.fused_optimizer import FusedOptimizer
    from lightning_accel.loop.callbacks.lean_loop import LeanLoop

__all__ = ["FusedOptimizer", "LeanLoop", "use_implementation"]


__getattr__ = lazily(
    __name__,
    {
        "FusedOptimizer": "callbacks.fused_optimizer",
        "LeanLoop": "callbacks.lean_loop",
    },
)
