"""Numbers in float64, also those of devices that have none (Apple's MPS, some other accelerators): on the CPU."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_HAVE = ("cpu", "cuda", "xla", "meta")
"""Not asked: that would start them."""


def widest(device: torch.device) -> torch.dtype:
    """Return the widest floating point type that a device has: float64, or float32.

    >>> widest(torch.device("cpu"))
    torch.float64
    """
    if device.type in _HAVE or _has_float64(
        device.type
    ):  # the compiler cannot look into the second
        return torch.float64
    return torch.float32


def wide(tensor: Tensor) -> Tensor:
    """Return the values in the widest floating point type of their device, or complex one; without a graph.

    >>> wide(torch.ones(1, dtype=torch.cfloat)).dtype
    torch.complex128
    """
    kind = widest(tensor.device)
    return tensor.detach().to(kind.to_complex() if tensor.is_complex() else kind)


def exact(tensor: Tensor) -> Tensor:
    """Return the values in float64 or complex128, without a graph: on the CPU where the device has no such type.

    >>> exact(torch.ones(1, dtype=torch.bfloat16))
    tensor([1.], dtype=torch.float64)
    """
    kept = tensor if widest(tensor.device) == torch.float64 else tensor.cpu()
    return kept.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


@cache
def _has_float64(kind: str) -> bool:
    """Ask the device."""
    try:
        torch.empty(0, dtype=torch.float64, device=kind)
    except (TypeError, RuntimeError):
        return False
    return True
