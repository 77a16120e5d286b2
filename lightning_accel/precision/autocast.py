"""The autocast context: weights are cast once per step, and never stale or without their gradient.

Autocast keeps the cast of a weight until the context ends, so that a weight used many times in one step
is cast once. Lightning 2.5.5 to 2.6.6 switch this off (its #20921), because of two traps:

- A weight that is first used under `no_grad` was kept without its graph, and got no gradient afterwards
  (Lightning #20644, PyTorch #158232). Fixed in PyTorch (#165068, in 2.11); for an older one we keep
  Lightning's answer. `cache_keeps_gradients` tells which by trying. It can go with torch 2.10.
- A weight that an optimizer changes within the context (manual optimization) keeps its old cast. The
  plugin clears the cache after every optimizer step.

As in PyTorch at large, the cache does not know dtypes: whoever enters another `torch.autocast` of a different
short dtype within, for the same weights, passes `cache_enabled=False` to it.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """Return an autocast context that casts each weight once where this PyTorch does that right.

    >>> with autocast("cpu", torch.bfloat16):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    return torch.autocast(device_type, dtype=dtype, cache_enabled=cache_keeps_gradients())


@lru_cache(maxsize=1)
def cache_keeps_gradients() -> bool:
    """Tell whether a cached cast made under `no_grad` still leads to the weight's gradient."""
    weight = torch.ones(1, 1, requires_grad=True)
    with torch.inference_mode(False), torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        with torch.no_grad():
            weight.mm(weight)
        with torch.enable_grad():
            return weight.mm(weight).requires_grad


def takes_effect(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether a matrix product under autocast really comes out in `dtype` on this device.

    >>> takes_effect(torch.device("cpu"), torch.bfloat16)
    True
    """
    if not torch.amp.is_autocast_available(device.type):
        return False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of a dtype that the device cannot do, for which we ask
        try:
            context = torch.autocast(device.type, dtype=dtype)
        except RuntimeError:  # CUDA without bf16
            return False
        with context:
            one = torch.ones(1, 1, device=device)
            return one.mm(one).dtype == dtype
