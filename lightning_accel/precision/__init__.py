"""Mixed precision in the best format of this hardware, and the memory format of convolutions."""

from typing import TYPE_CHECKING, Any

from lightning_accel.precision.layout import channels_last
from lightning_accel.precision.policy import Policy, resolve

if TYPE_CHECKING:
    from lightning_accel.precision.callback import MemoryFormat
    from lightning_accel.precision.plugin import AutocastPrecision

__all__ = ["AutocastPrecision", "MemoryFormat", "Policy", "channels_last", "resolve"]


def __getattr__(name: str) -> Any:
    if name == "AutocastPrecision":
        from lightning_accel.precision.plugin import AutocastPrecision

        return AutocastPrecision
    if name == "MemoryFormat":
        from lightning_accel.precision.callback import MemoryFormat

        return MemoryFormat
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
