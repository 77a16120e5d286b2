"""Which format to compute in: a name and a device in, a dtype, a scaler and a reason out.

bf16 has the range of fp32, so gradients neither vanish nor overflow and nothing has to be scaled; it is
taken wherever it is really fast. fp16 is fast on older GPUs too, but its gradients need a scaler. What is
fast is measured on the device (`hardware`), not read from its name. On a CPU fp16 is never right: it is
between 4 and 100 times slower than fp32.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from lightning_accel import hardware
from lightning_accel.arguments import one_of
from lightning_accel.errors import Unsupported
from lightning_accel.precision.autocast import takes_effect

FORMATS = ("auto", "bf16", "fp16", "fp32")

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Policy(NamedTuple):
    """A format: the dtype of autocast (`None`: compute in fp32), whether to scale, and why.

    >>> Policy(torch.bfloat16, False, "asked for").dtype
    torch.bfloat16
    """

    dtype: torch.dtype | None
    scaler: bool
    reason: str


def check(format: Any) -> str:
    """Return the name of a format, or raise and list the known ones.

    >>> check("bf16")
    'bf16'
    """
    return one_of("format", format, FORMATS)


def resolve(format: str = "auto", device: torch.device | str = "cpu") -> Policy:
    """Choose the format for a device.

    Args:
        format: "auto" is the best one; "bf16", "fp16" and "fp32" are taken as asked.
        device: Where the model computes; the device is used for a moment.

    Raises:
        ValueError: The format is unknown.
        Unsupported: The device cannot do what was asked explicitly.

    >>> resolve("fp32", "cpu")
    Policy(dtype=None, scaler=False, reason='fp32 was asked for')
    """
    check(format)
    device = torch.device(device)
    if format == "fp32":
        return Policy(None, False, "fp32 was asked for")
    if format == "auto":
        return _best(device)
    dtype = _DTYPES[format]
    if dtype == torch.float16 and device.type == "cpu":
        raise Unsupported(
            "fp16 on a CPU is far slower than fp32",
            "format='fp16' with a CPU",
            "pass 'bf16', or 'auto' to let the hardware decide",
        )
    if not takes_effect(device, dtype):
        raise Unsupported(
            f"{format} autocast has no effect on this device",
            f"a matrix product under torch.autocast('{device.type}') that stayed in fp32",
            "pass 'auto' or 'fp32'",
        )
    slow = "" if dtype in _fast(device) else f", though it is not fast on {_name(device)}"
    return Policy(dtype, dtype == torch.float16, f"{format} was asked for{slow}")


def _best(device: torch.device) -> Policy:
    fast = _fast(device)
    for dtype in (torch.bfloat16, torch.float16):
        if dtype == torch.float16 and device.type == "cpu":
            continue
        if dtype in fast and takes_effect(device, dtype):
            name = str(dtype).removeprefix("torch.")
            return Policy(dtype, dtype == torch.float16, f"{name} is fast on {_name(device)}")
    return Policy(None, False, f"no shorter format is both fast and usable on {_name(device)}")


def _fast(device: torch.device) -> Collection[torch.dtype]:
    return hardware.describe(device).fast_dtypes


def _name(device: torch.device) -> str:
    return hardware.describe(device).name or device.type


def _listed() -> str:
    return ", ".join(repr(name) for name in FORMATS)
