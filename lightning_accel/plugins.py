"""Every plugin of this package, as `lightning.pytorch.plugins` has Lightning's."""

from typing import TYPE_CHECKING

from lightning_accel import _HOMES
from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel import (
        AutocastPrecision,
        Bf16Precision,
        MPIVariables,
        XlaPrecision,
    )

__all__ = [
    "AutocastPrecision",
    "Bf16Precision",
    "MPIVariables",
    "XlaPrecision",
]

__getattr__ = lazily("lightning_accel", {name: _HOMES[name] for name in __all__})
