"""Every accelerator of this package, as `lightning.pytorch.accelerators` has Lightning's."""

from typing import TYPE_CHECKING

from lightning_accel import _HOMES
from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel import TorchAccelerator

__all__ = ["TorchAccelerator"]

__getattr__ = lazily("lightning_accel", {name: _HOMES[name] for name in __all__})
