"""Which parts of a whole can be had together, found by halving."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

_LATE = "not tried: the time for trying groups one by one was over"


def sound(
    parts: Sequence[T],
    failure: Callable[[Sequence[T]], str],
    *,
    mend: Callable[[T], bool],
    until: float,
) -> tuple[list[T], list[tuple[T, str]]]:
    """Return the parts that do not fail together, and the others with the reason.

    Args:
        parts: What is wanted.
        failure: Why some parts cannot be had together; empty if they can.
        mend: Changes how one part is had, if there is another way; whether there is.
        until: When to stop trying, by the monotonic clock.

    >>> sound([1, 2, 3, 4], lambda some: "odd" if 3 in some else "", mend=lambda _: False, until=1e18)
    ([1, 2, 4], [(3, 'odd')])
    """
    refused: list[tuple[T, str]] = []

    def search(some: list[T]) -> list[T]:
        if time.monotonic() > until:
            refused.extend((part, _LATE) for part in some)
            return []
        reason = failure(some)
        if not reason:
            return some
        if len(some) == 1:
            if mend(some[0]) and not failure(some):
                return some
            refused.append((some[0], reason))
            return []
        half = len(some) // 2
        left, right = search(some[:half]), search(some[half:])
        if not left or not right or not failure(left + right):
            return left + right
        for part in right:  # sound apart, not together
            reason = failure([*left, part])
            if reason:
                refused.append((part, reason))
            else:
                left = [*left, part]
        return left

    return search(list(parts)), refused
