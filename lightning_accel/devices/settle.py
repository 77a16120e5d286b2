"""A Trainer computes where and how it was asked to: on the device of its accelerator, in the precision of its flag.

Lightning 2.6.6 knows CPU, CUDA, MPS and torch_xla. With any other accelerator, one device means the CPU, and
`precision="bf16-mixed"` autocasts for CUDA, which has no effect elsewhere; of both it says nothing. Lightning asks each
installed package for callbacks while a Trainer is being built (`entry.py`), and then both can still be put right.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision, XLAPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn

from lightning_accel.devices.torch_accelerator import TorchAccelerator
from lightning_accel.errors import Unsupported
from lightning_accel.precision.plugins.autocast_precision import AutocastPrecision
from lightning_accel.precision.plugins.xla_precision import XlaPrecision

_KNOWN = ("cpu", "cuda", "mps")
"""What Lightning gives a device and autocast by itself."""


def settle(trainer: Trainer) -> None:
    """See to it that a Trainer is on its accelerator's device, and that its autocast is for that device.

    >>> trainer = Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    >>> settle(trainer)
    >>> trainer.precision_plugin.device
    'cpu'
    """
    ours = isinstance(trainer.accelerator, TorchAccelerator)
    if ours:
        _refuse(trainer)
    moved, cast = _place(trainer), _autocast(trainer)
    if ours:
        trainer.accelerator.settled = True  # type: ignore[attr-defined]
    elif moved or cast:
        rank_zero_warn(
            f"With {type(trainer.accelerator).__name__}, Lightning would have "
            f"{' and '.join(filter(None, (moved, cast)))}; this was put right."
        )
    _say_unused(trainer)


def _refuse(trainer: Trainer) -> None:
    kind = trainer._accelerator_connector._parallel_devices[0].type  # type: ignore[union-attr]
    if type(trainer.strategy) is DDPStrategy and kind not in _KNOWN:
        raise Unsupported(
            "Lightning's DDP opens streams of CUDA, and sends by gloo what is not on CUDA",
            f"strategy 'ddp', which Lightning chose or was asked for, on {kind}",
            "pass strategy='accel_ddp' or 'accel_fsdp'",
        )


def _place(trainer: Trainer) -> str:
    """Put one device to what its accelerator said; Lightning says "cpu" of what it does not know."""
    strategy: Any = trainer.strategy
    planned: Any = trainer._accelerator_connector._parallel_devices
    if type(strategy) is not SingleDeviceStrategy or strategy.root_device.type != "cpu":
        return ""
    if len(planned) != 1 or not isinstance(planned[0], torch.device) or planned[0].type == "cpu":
        return ""
    strategy._root_device = planned[0]
    return f"trained on the CPU instead of {planned[0]}"


def _autocast(trainer: Trainer) -> str:
    """Put an autocast that is for another device than the Trainer's to one that has an effect."""
    plugin, kind = trainer.precision_plugin, _kind(trainer)
    if type(plugin) is XLAPrecision and plugin.precision == "16-true":
        raise Unsupported(
            "XLA has no float16 by Lightning: it would compute in float32 without a word",
            "precision='16-true' on XLA",
            "pass precision='bf16-true', or plugins=[XlaPrecision('bf16-mixed')]",
        )
    if type(plugin) is XLAPrecision and plugin.precision == "bf16-true":
        plugin.teardown()  # takes back a variable that torch_xla reads before its first tensor, or never
        own: Any = XlaPrecision("bf16-true")
    elif type(plugin) is MixedPrecision and plugin.device != kind:
        own = AutocastPrecision(plugin.precision)  # type: ignore[arg-type]
    else:
        return ""
    trainer.strategy.precision_plugin = own
    trainer._accelerator_connector.precision_plugin = own
    return f"computed in float32 instead of {plugin.precision}"


def _say_unused(trainer: Trainer) -> None:
    """Say what Lightning says of GPUs only: that there is a device beside the CPU in use."""
    if _kind(trainer) != "cpu":
        return
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is not None and found.type not in _KNOWN:
        rank_zero_warn(
            f"{torch.accelerator.device_count()} {found.type} available and not used: Lightning does not know them. "
            "Do: Trainer(accelerator='accel')."
        )


def _kind(trainer: Trainer) -> str:
    """Return the kind of the device, without asking a strategy that does not know it before its processes are there."""
    planned: Any = trainer._accelerator_connector._parallel_devices
    if isinstance(trainer.strategy, SingleDeviceStrategy):
        return trainer.strategy.root_device.type
    first = planned[0] if planned else None
    return first.type if isinstance(first, torch.device) else "xla"
