"""How much is gone after each step of a pruning schedule."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from lightning_accel.errors import explain


def epochs(when: Any) -> tuple[int, ...]:
    """Read `when` as ascending epochs.

    >>> epochs(3), epochs([1, 4])
    ((3,), (1, 4))
    """
    listed = tuple(when) if isinstance(when, Iterable) and not isinstance(when, str) else (when,)
    whole = all(type(epoch) is int and epoch >= 0 for epoch in listed)
    if not listed or not whole or any(a >= b for a, b in pairwise(listed)):
        raise ValueError(
            explain(
                "`when` is an epoch or a list of ascending epochs, counted from 0",
                repr(when),
                "pass 3, or [2, 4, 6]",
            )
        )
    return listed


def share_left(kept: float, step: int, steps: int) -> float:
    """Return the share to keep after `step` of `steps`, falling linearly from 1 to `kept`.

    >>> [share_left(0.4, step, 3) for step in (0, 1, 3)]
    [1.0, 0.8, 0.4]
    """
    return 1.0 - (1.0 - kept) * step / steps
