"""Shorter formats of this hardware where they are safe: mixed, whole and float8, exact products, memory format."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily
from lightning_accel.precision.float8 import float8_linear
from lightning_accel.precision.layout import channels_last
from lightning_accel.precision.matmul import matmul_precision, probe_matmul
from lightning_accel.precision.policy import Policy, resolve

if TYPE_CHECKING:
    from lightning_accel.precision.callbacks.float8_linear import Float8Linear
    from lightning_accel.precision.callbacks.matmul_precision import MatmulPrecision
    from lightning_accel.precision.callbacks.memory_format import MemoryFormat
    from lightning_accel.precision.callbacks.use_precision import UsePrecision
    from lightning_accel.precision.plugins.autocast_precision import AutocastPrecision
    from lightning_accel.precision.plugins.bf16_precision import Bf16Precision
    from lightning_accel.precision.plugins.xla_precision import XlaPrecision

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


__getattr__ = lazily(
    __name__,
    {
        "AutocastPrecision": "plugins.autocast_precision",
        "Bf16Precision": "plugins.bf16_precision",
        "Float8Linear": "callbacks.float8_linear",
        "MatmulPrecision": "callbacks.matmul_precision",
        "MemoryFormat": "callbacks.memory_format",
        "UsePrecision": "callbacks.use_precision",
        "XlaPrecision": "plugins.xla_precision",
    },
)
