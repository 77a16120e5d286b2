"""Which channels go, given their scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept_width(width: int, *, ratio: float, blocks: int = 1, round_to: int | None = None) -> int:
    """Return how many of `width` channels stay when a share `ratio` of them is to go.

    Args:
        width: Channels of the dense layer.
        ratio: Share to remove, 0 to 1. At least one channel per block stays.
        blocks: The channels come in this many blocks that must stay of equal size (groups of a
            convolution or a GroupNorm).
        round_to: The result is raised to a multiple of this, up to `width`.

    >>> kept_width(10, ratio=0.3), kept_width(10, ratio=0.3, round_to=8), kept_width(4, ratio=0.99)
    (7, 8, 1)
    """
    per_block = width // blocks
    kept = max(1, per_block - math.floor(per_block * ratio + 1e-6))
    if round_to:
        step = round_to // math.gcd(round_to, blocks)
        kept = min(per_block, math.ceil(kept / step) * step)
    return kept * blocks


def least(scores: Tensor, *, kept: int, blocks: int = 1) -> list[int]:
    """Return the positions of the least important channels, ascending, so that `kept` stay.

    Args:
        scores: One per channel, shape (channels,).
        kept: How many stay; a multiple of `blocks`.
        blocks: The same places are removed from each of this many equal blocks.

    >>> least(torch.tensor([3.0, 1.0, 2.0, 4.0]), kept=2)
    [1, 2]
    >>> least(torch.tensor([4.0, 1.0, 3.0, 2.0]), kept=2, blocks=2)
    [1, 3]
    """
    per_block = scores.view(blocks, -1).mean(0)
    gone = len(per_block) - kept // blocks
    order = torch.argsort(per_block, stable=True)[: max(gone, 0)]
    width = len(per_block)
    return sorted(block * width + place for block in range(blocks) for place in order.tolist())
