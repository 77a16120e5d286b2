"""Which format to compute in: a name and a device in, a dtype, a scaler and a reason out.

bf16 has the range of fp32, so gradients neither vanish nor overflow and nothing has to be scaled; it is
taken wherever it is really fast. fp16 is fast on older GPUs too, but its gradients need a scaler. What is
fast is measured on the device (`hardware`), not read from its name. On a CPU fp16 is never right: it is
between 4 and 100 times slower than fp32.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, get_args

import torch

from lightning_accel import hardware
from lightning_accel.arguments import one_of
from lightning_accel.errors import Unsupported
from lightning_accel.precision.autocast import takes_effect

Precisions = Literal["auto", "bf16-mixed", "16-mixed", "32-true"]
PRECISIONS = get_args(Precisions)
"""Those of the Trainer that keep weights in float32, and `auto` for the best of them on a device."""

_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Policy(NamedTuple):
    """A format: the dtype of autocast (`None`: compute in fp32), whether to scale, and why.

    >>> Policy(torch.bfloat16, False, "asked for").dtype
    torch.bfloat16
    """

    dtype: torch.dtype | None
    scaler: bool
    reason: str


def check(precision: Any) -> str:
    """Return the precision, or raise and list the known ones.

    >>> check("bf16-mixed")
    'bf16-mixed'
    """
    return one_of("precision", precision, PRECISIONS)


def resolve(precision: str = "auto", device: torch.device | str = "cpu") -> Policy:
    """Choose the format for a device.

    Args:
        precision: "auto" is the best one; "bf16-mixed", "16-mixed" and "32-true" are taken as asked.
        device: Where the model computes; the device is used for a moment.

    Raises:
        ValueError: The precision is unknown.
        Unsupported: The device cannot do what was asked explicitly.

    >>> resolve("32-true", "cpu")
    Policy(dtype=None, scaler=False, reason='32-true was asked for')
    """
    check(precision)
    device = torch.device(device)
    if precision == "32-true":
        return Policy(None, False, "32-true was asked for")
    if precision == "auto":
        return _best(device)
    dtype = _DTYPES[precision]
    if dtype == torch.float16 and device.type == "cpu":
        raise Unsupported(
            "fp16 on a CPU is far slower than fp32",
            "precision='16-mixed' with a CPU",
            "pass 'bf16-mixed', or 'auto' to let the hardware decide",
        )
    if not takes_effect(device, dtype):
        raise Unsupported(
            f"{precision} autocast has no effect on this device",
            f"a matrix product under torch.autocast('{device.type}') that stayed in fp32",
            "pass 'auto' or '32-true'",
        )
    slow = "" if dtype in _fast(device) else f", though it is not fast on {_name(device)}"
    return Policy(dtype, dtype == torch.float16, f"{precision} was asked for{slow}")


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
