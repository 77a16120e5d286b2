"""Devices that Lightning does not know: an accelerator for all of them, and Trainers that really use it."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.devices.torch_accelerator import TorchAccelerator

__all__ = ["TorchAccelerator"]

__getattr__ = lazily(__name__, {"TorchAccelerator": "torch_accelerator"})
