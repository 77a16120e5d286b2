"""Which channels go, given their scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def least(
    scores: Tensor, *, ratio: float, blocks: int = 1, round_to: int | None = None
) -> list[int]:
    """Return the positions of the least important channels, ascending; may be empty.

    Args:
        scores: One per channel, shape (channels,).
        ratio: Share of the channels to remove, 0 to 1. At least one channel per block stays.
        blocks: Channels come in this many equal blocks that must stay of equal size (groups of a
            convolution or a GroupNorm); the same places are removed from each.
        round_to: The number of kept channels is raised to a multiple of this.

    >>> least(torch.tensor([3.0, 1.0, 2.0, 4.0]), ratio=0.5)
    [1, 2]
    >>> least(torch.tensor([4.0, 1.0, 3.0, 2.0]), ratio=0.5, blocks=2)
    [1, 3]
    """
    per_block = scores.view(blocks, -1).mean(0)
    width = len(per_block)
    kept = max(1, width - math.floor(width * ratio + 1e-6))
    if round_to:
        step = round_to // math.gcd(round_to, blocks)
        kept = min(width, math.ceil(kept / step) * step)
    order = torch.argsort(per_block, stable=True)[: width - kept]
    return sorted(block * width + place for block in range(blocks) for place in order.tolist())
