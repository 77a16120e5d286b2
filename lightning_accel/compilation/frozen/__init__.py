"""Networks compiled with their weights baked in, for prediction only."""

from lightning_accel.compilation.frozen.freeze import Frozen, frozen

__all__ = ["Frozen", "frozen"]
