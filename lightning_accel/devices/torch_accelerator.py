"""`TorchAccelerator`: any device that `torch.accelerator` speaks to, also those that Lightning does not know.

XPU, NPU, Neuron and TPU (by torch_tpu) all come to torch as one kind of device with the same functions, and Lightning
2.6.6 has a class for none of them: `accelerator="auto"` trains on the CPU beside them (Lightning #20848, #17700).
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from typing_extensions import override

from lightning_accel.errors import Unsupported, explain

NAME = "accel"
"""What a Trainer calls it."""


class TorchAccelerator(Accelerator):
    """Train on the device of `torch.accelerator`: `Trainer(accelerator="accel")`.

    A Trainer with it computes on that device and in the precision that is asked for, by `AutocastPrecision`; Lightning
    alone would put the module on the CPU, and autocast for CUDA.

    Raises:
        Unsupported: torch sees no such device; or a Trainer would use another one.

    >>> found = torch.accelerator.current_accelerator(check_available=True)
    >>> TorchAccelerator.is_available() == (found is not None)
    True
    """

    def __init__(self) -> None:
        if not self.is_available():
            raise missing(NAME)
        self.settled = False
        """Whether the Trainer's strategy and precision were seen to be of this device (`settle.py`)."""

    @override
    def setup_device(self, device: torch.device) -> None:
        """Use this device from now on, which must be of the kind that was asked for."""
        kind = _kind()
        if device.type != kind or not self.settled:
            raise Unsupported(
                f"the Trainer was asked to train on {kind}, and would train on {device.type} or in another precision",
                "a Trainer that this package did not see being built"
                if not self.settled
                else f"a strategy for {device}",
                "install lightning_accel by pip, so that Lightning finds its entry points; and pass no strategy of "
                "another device",
            )
        if device.index is not None:
            torch.accelerator.set_device_index(device.index)

    @override
    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Return what the allocator counts, where the device has one that does."""
        return dict(torch.accelerator.memory_stats(device)) if _counts(torch.device(device)) else {}

    @override
    def teardown(self) -> None:
        """Give unused memory back."""
        if _counts(torch.device(_kind())):
            torch.accelerator.empty_cache()

    @staticmethod
    @override
    def parse_devices(devices: Any) -> list[int]:
        """Return indices: of a number of devices, of a list, or of text such as "2", "0,1" and "-1" for all."""
        there, given = torch.accelerator.device_count(), devices
        if isinstance(devices, str):
            words = [word.strip() for word in devices.split(",") if word.strip()]
            if not words or not all(word.lstrip("-").isdigit() for word in words):
                raise _devices(ValueError, given, there)
            several = "," in devices
            devices = [int(word) for word in words] if several else int(words[0])
        if isinstance(devices, int) and not isinstance(devices, bool):
            devices = list(range(there if devices == -1 else devices))
        if not isinstance(devices, (list, tuple)) or not all(type(d) is int for d in devices):
            raise _devices(TypeError, given, there)
        if not devices or len(set(devices)) < len(devices) or not set(devices) <= set(range(there)):
            raise _devices(ValueError, given, there)
        return list(devices)

    @staticmethod
    @override
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(_kind(), index) for index in devices]

    @staticmethod
    @override
    def auto_device_count() -> int:
        return torch.accelerator.device_count()

    @staticmethod
    @override
    def is_available() -> bool:
        return torch.accelerator.current_accelerator(check_available=True) is not None

    @staticmethod
    @override
    def name() -> str:
        return NAME


def register() -> None:
    """Tell Lightning the name, and that of the device itself if it knows none; a second time changes nothing."""
    description = "the device of torch.accelerator, whatever it is"
    AcceleratorRegistry.register(NAME, TorchAccelerator, description=description, override=True)
    found = torch.accelerator.current_accelerator()
    if found is not None and found.type not in AcceleratorRegistry:
        AcceleratorRegistry.register(found.type, TorchAccelerator, description=description)


def missing(name: str) -> Unsupported:
    """Return the error of a Trainer on a machine without such a device."""
    return Unsupported(
        f"accelerator={name} wants a device that torch.accelerator finds, and there is none",
        f"torch {torch.__version__} on this machine",
        "say accelerator=auto or accelerator=cpu; or install what brings the device to this torch, such as torch_tpu, "
        "torch-npu, torch-neuronx, or a torch that was built for XPU",
    )


def _kind() -> str:
    found = torch.accelerator.current_accelerator()
    assert found is not None  # `__init__` refuses
    return found.type


def _counts(device: torch.device) -> bool:
    """Whether its allocator says what it holds; one that does not raises for each question."""
    try:
        torch.accelerator.memory_allocated(device)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _devices(kind: type[Exception], found: Any, there: int) -> Exception:
    return kind(
        explain(
            f"`devices` names each device once, of those from 0 to {there - 1}",
            repr(found),
            f"pass how many, such as {there}, a list of indices, or 'auto'",
        )
    )
