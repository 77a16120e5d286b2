"""How far apart two nested results are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_accel.exact import exact


def difference(found: Any, wanted: Any) -> float:
    """Return the largest relative difference of two nested results: of norms, or the share of integers.

    Infinite where structures, shapes or the places of what is not finite differ.

    >>> difference([torch.tensor([3.0, 4.4])], [torch.tensor([3.0, 4.0])])
    0.08...
    """
    some, others = tree_leaves(found), tree_leaves(wanted)
    if len(some) != len(others):
        return float("inf")
    return max((_difference(a, b) for a, b in zip(some, others, strict=True)), default=0.0)


def _difference(found: Any, wanted: Any) -> float:
    if not isinstance(wanted, Tensor) or not isinstance(found, Tensor):
        return 0.0 if type(found) is type(wanted) else float("inf")
    if found.shape != wanted.shape:
        return float("inf")
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return float((found != wanted).float().mean()) if wanted.numel() else 0.0
    a, b = exact(found), exact(wanted)
    same = a == b  # infinities of a mask among them
    if not bool(torch.isfinite(torch.where(same, 0, b)).all()):
        return float("inf")
    gap = torch.where(same, 0, a - b).abs().square().sum().sqrt()
    norm = torch.where(torch.isfinite(b), b, 0).abs().square().sum().sqrt()
    if not bool(torch.isfinite(gap)):
        return float("inf")
    return float(gap / norm) if bool(norm > 0) else float(gap)
