"""Every strategy of this package, as `lightning.pytorch.strategies` has Lightning's."""

from typing import TYPE_CHECKING

from lightning_accel import _HOMES
from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel import (
        AccelDDPStrategy,
        AutoStrategy,
        FSDP2Strategy,
        TensorParallelStrategy,
    )

__all__ = ["AccelDDPStrategy", "AutoStrategy", "FSDP2Strategy", "TensorParallelStrategy"]

__getattr__ = lazily("lightning_accel", {name: _HOMES[name] for name in __all__})
