"""Whether a teacher may be cached row by row, and whether what is on disk is what it says: tried on its own rows.

A cache gives the answer to a row wherever the row comes again, so the answer must not depend on the other rows of
its batch, on random numbers, or on time. That is tried: at the first look-ups, at rows of another shape and now
and then, the teacher answers the whole batch, and again the second half of it backwards. Backwards and the second
half, because a network that takes the first dimension for time would answer the beginning alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_accel.seldom import is_due
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.surgery.rng import random_state

EXACT, SHORT = 1e-3, 5e-2
"""How much of its largest number an answer may differ by, in 32 bits and in 16: kernels depend on the batch."""

Answers = Mapping[str, Tensor]


class Checks:
    """When to look: at look-ups 1, 2, 4, 8 ..., at every `every`-th, and at the first of each form of rows.

    >>> checks = Checks(every=4)
    >>> [checks.are_due("form", 2) for _ in range(8)]
    [True, True, False, True, False, False, False, True]
    """

    def __init__(self, every: int | None) -> None:
        self.every, self._count = every, 0
        self._forms: set[Any] = set()

    def are_due(self, form: Any, rows: int) -> bool:
        """Count one look-up of `rows` rows, and tell whether to look at it."""
        if self.every is None:
            return False
        self._count += 1
        fresh = rows > 1 and form not in self._forms
        if fresh:
            self._forms.add(form)
        return fresh or is_due(self._count, self.every)


class Tried(NamedTuple):
    """What a teacher said to a whole batch, and why it cannot be cached, if so."""

    answers: Answers
    doubt: str | None


def try_rows(run: Callable[[np.ndarray], Answers], batch: int, tolerance: float = EXACT) -> Tried:
    """Let a teacher answer all rows, and some of them alone.

    Args:
        run: Answers the rows of the batch that have these numbers.
        batch: How many there are.
        tolerance: How much of its largest number an answer may differ by.

    >>> x = torch.tensor([[1.0], [2.0]])
    >>> try_rows(lambda rows: {"logits": x[rows]}, 2).doubt is None
    True
    >>> try_rows(lambda rows: {"logits": x[rows] - x[rows].mean()}, 2).doubt
    '`logits` of a row depends on the other rows of the batch'
    """
    before = random_state()
    whole = run(np.arange(batch))
    drew = _drew(before)
    if drew:
        return Tried(whole, f"it draws random numbers of {drew}")
    if batch < 2:
        return Tried(whole, None)
    rows = np.arange(batch)[::-1][: max(1, batch // 2)].copy()
    try:
        with preserve_rng():
            part = run(rows)
    except (
        Exception
    ) as error:  # whatever a teacher does with fewer rows than its other arguments have
        return Tried(whole, f"it fails on a part of the rows, {type(error).__name__}: {error}")
    for name, answer in whole.items():
        alone = part.get(name)
        fits = alone is not None and alone.shape[1:] == answer.shape[1:] and len(alone) == len(rows)
        if not fits or not alike(
            answer[torch.from_numpy(rows).to(answer.device)], alone, tolerance
        ):
            return Tried(whole, f"`{name}` of a row depends on the other rows of the batch")
    return Tried(whole, None)


def alike(one: Tensor, other: Tensor | None, tolerance: float) -> bool:
    """Tell whether two answers differ by no more than rounding.

    >>> alike(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0001]), 1e-3)
    True
    """
    if other is None or one.shape != other.shape:
        return False
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    one, other = one.detach().float(), other.detach().float()
    good = one.isfinite()
    if not torch.equal(good, other.isfinite()):
        return False
    one, other = one[good], other[good]
    return not one.numel() or bool((one - other).abs().max() <= tolerance * one.abs().max())


def _drew(before: dict[str, Any]) -> str:
    now = random_state()
    return next((name for name in before if not _same(before[name], now[name])), "")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
