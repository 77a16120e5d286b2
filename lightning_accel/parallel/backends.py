"""How processes of a device talk to each other: by what torch names for it, and not by gloo for all but CUDA."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightning_accel.errors import Unsupported


def backend_of(device: torch.device) -> str:
    """Return the backend that torch has for a device; Lightning 2.6.6 says gloo of all that is not CUDA.

    Raises:
        Unsupported: torch has none.

    >>> backend_of(torch.device("cpu"))
    'gloo'
    """
    try:
        return dist.get_default_backend_for_device(device.type)
    except ValueError:
        raise Unsupported(
            "processes of this device have no way to talk to each other that torch knows",
            f"no default backend of torch.distributed for {device.type}",
            "import the package that brings it, or pass `process_group_backend=` to the strategy",
        ) from None
