"""The autocast context: every use of a weight casts it anew, as in Lightning.

Autocast can keep the cast of a weight until the context ends. That context is here a whole step, and a kept
cast is wrong in it in ways that nothing reports, which is why Lightning switched it off (its #20921):

- A weight that changes within a step is used with its old values: manual optimization, SAM, MAML, test-time
  training, averages swapped in between two forwards, noise added to `weight.data`.
- All uses of a weight share one cast, and their gradients are summed in that cast's short format: used 400
  times, a weight has a gradient that is off by a fifth.
- A weight first used under `no_grad` got no gradient (Lightning #20644, PyTorch #158232).
"""

from __future__ import annotations

import warnings

import torch


def autocast(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """Return an autocast context that keeps no cast of a weight.

    >>> with autocast("cpu", torch.bfloat16):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.bfloat16
    """
    return torch.autocast(device_type, dtype=dtype, cache_enabled=False)


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
