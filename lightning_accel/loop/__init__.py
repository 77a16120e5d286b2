"""Less host time per step: lean logging, fewer waits, and optimizers in one kernel."""

from typing import TYPE_CHECKING, Any

from lightning_accel.loop.fused import use_implementation

if TYPE_CHECKING:
    from lightning_accel.loop.callback import FusedOptimizer, LeanLoop

__all__ = ["FusedOptimizer", "LeanLoop", "use_implementation"]


def __getattr__(name: str) -> Any:
    if name in ("FusedOptimizer", "LeanLoop"):
        from lightning_accel.loop import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
