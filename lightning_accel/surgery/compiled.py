"""Whether modules run code of `torch.compile`: in which later hooks never fire, and which copies do not have."""

from __future__ import annotations

import torch
from torch import nn


def runs_compiled(module: nn.Module) -> bool:
    """Tell whether a call of this very module runs compiled code."""
    compiled = getattr(module, "_compiled_call_impl", None) is not None
    return compiled or isinstance(module, torch._dynamo.OptimizedModule)


def is_compiled(model: nn.Module) -> bool:
    """Tell whether any part does.

    >>> is_compiled(nn.Linear(2, 2)), is_compiled(torch.compile(nn.Linear(2, 2), backend="eager"))
    (False, True)
    """
    return any(map(runs_compiled, model.modules()))
