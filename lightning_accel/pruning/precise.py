"""Float64 throughout, also where a forward goes on in a narrower type.

Many a norm and rotation computes in float32 by its own code (`x.float()`). In a float64 copy that rounds, and
two networks that are the same differ by 1e-7 from there on: too much for a proof to tell from an error. Or it
fails, where a layer in float64 is given whole numbers as float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_NARROWER = {torch.float32, torch.float16, torch.bfloat16}


class Precise(TorchDispatchMode):
    """Converts to float64 what would be converted to less.

    Attributes:
        kept: How often that was so.

    >>> with Precise():
    ...     torch.ones(1, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        converts = func is torch.ops.aten._to_copy.default and kwargs.get("dtype") in _NARROWER
        if converts and args[0].dtype not in _NARROWER:
            self.kept += 1
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)
