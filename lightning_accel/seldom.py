"""At which calls a technique looks at itself: often at first, then now and then, or never.

What replaces a computation (a compiled block, a frozen copy, a recomputation, answers from a cache) is right as long
as what it rests on is as it was. So some calls are computed plainly as well and compared: the first, second, fourth,
eighth ..., where most mistakes show, and every `check_every_n_calls`-th. `None` is never.
"""

from __future__ import annotations

from typing import Any

from lightning_accel.arguments import whole


def check_seldom(check_every_n_calls: Any) -> int | None:
    """Return how often to look, or raise.

    Raises:
        TypeError: It is neither a whole number nor `None`.
        ValueError: It is below 1.

    >>> check_seldom(64), check_seldom(None)
    (64, None)
    """
    do = "pass 64, say; never is None (in yaml: null)"
    return whole("check_every_n_calls", check_every_n_calls, none=True, do=do)


def is_due(number: int, check_every_n_calls: int | None) -> bool:
    """Tell whether call `number`, from 1, is one to look at.

    >>> [number for number in range(1, 21) if is_due(number, 10)]
    [1, 2, 4, 8, 10, 20]
    """
    if check_every_n_calls is None:
        return False
    return number % check_every_n_calls == 0 or (
        number < check_every_n_calls and number & (number - 1) == 0
    )
