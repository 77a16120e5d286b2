"""Shorter formats of this hardware where they are safe: mixed, whole and float8, exact products, memory format."""

from typing import TYPE_CHECKING, Any

from lightning_accel.precision.float8 import float8_linear
from lightning_accel.precision.layout import channels_last
from lightning_accel.precision.matmul import matmul_precision, probe_matmul
from lightning_accel.precision.policy import Policy, resolve

if TYPE_CHECKING:
    from lightning_accel.precision.callback import (
        Float8Linear,
        MatmulPrecision,
        MemoryFormat,
        UsePrecision,
    )
    from lightning_accel.precision.plugin import AutocastPrecision
    from lightning_accel.precision.true.plugin import Bf16Precision, XlaPrecision

__all__ = [
    "AutocastPrecision",
    "Bf16Precision",
    "Float8Linear",
    "MatmulPrecision",
    "MemoryFormat",
    "Policy",
    "UsePrecision",
    "XlaPrecision",
    "channels_last",
    "float8_linear",
    "matmul_precision",
    "probe_matmul",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name == "AutocastPrecision":
        from lightning_accel.precision.plugin import AutocastPrecision

        return AutocastPrecision
    if name in ("Bf16Precision", "XlaPrecision"):
        from lightning_accel.precision.true import plugin

        return getattr(plugin, name)
    if name in ("Float8Linear", "MatmulPrecision", "MemoryFormat", "UsePrecision"):
        from lightning_accel.precision import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
