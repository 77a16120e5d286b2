"""How much is gone after each step of a pruning schedule.

With t the share of the steps that are done and k the share to keep at the end:

- `one_shot`: everything in one step;
- `linear`: 1 - (1 - k) t, the same amount each time;
- `cubic`: 1 - (1 - k) (1 - (1 - t)^3), most of it early, while there is redundancy and time to recover
  (Zhu and Gupta 2017, arXiv:1710.01878);
- `iterative`: k^t, the same share of what is left each time (Han et al. 2015, arXiv:1506.02626).
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from lightning_accel.arguments import one_of
from lightning_accel.errors import explain

Schedule = Literal["one_shot", "linear", "cubic", "iterative"]
SCHEDULES = get_args(Schedule)

_GONE: dict[str, Callable[[float, float], float]] = {
    "one_shot": lambda ratio, done: ratio * done,
    "linear": lambda ratio, done: ratio * done,
    "cubic": lambda ratio, done: ratio * (1.0 - (1.0 - done) ** 3),
    "iterative": lambda ratio, done: 1.0 - (1.0 - ratio) ** done,
}

When = tuple[int, ...] | tuple[float, ...]
"""Epochs counted from 0, or shares of all epochs between 0 and 1."""


def moments(when: Any) -> When:
    """Read `when` as ascending epochs, or as ascending shares of the fit.

    A whole number is an epoch in whatever type it comes: jsonargparse, and so LightningCLI, makes 2.0 of 2.

    >>> moments(3), moments([1, 4]), moments(0.4), moments(2.0)
    ((3,), (1, 4), (0.4,), (2,))
    """
    listed = tuple(when) if isinstance(when, Iterable) and not isinstance(when, str) else (when,)
    listed = tuple(map(_as_epoch, listed))
    whole = all(type(epoch) is int and epoch >= 0 for epoch in listed)
    shares = all(type(share) is float and 0 < share < 1 for share in listed)
    if not listed or not (whole or shares) or any(a >= b for a, b in pairwise(listed)):
        raise ValueError(
            explain(
                "`when` is an epoch counted from 0, a share of the fit between 0 and 1, or an ascending "
                "list of either",
                repr(when),
                "pass 3, [2, 4, 6] or 0.4",
            )
        )
    return listed


def _as_epoch(moment: Any) -> Any:
    if isinstance(moment, bool) or not isinstance(moment, numbers.Real):
        return moment
    share = float(moment)
    return int(share) if share.is_integer() else share


def epochs(when: When, max_epochs: int | None) -> tuple[int, ...]:
    """Return the epochs that are meant in a fit of so many; a share is at least epoch 1.

    Raises:
        ValueError: A share of a fit without a number of epochs.

    >>> epochs((0.4,), 20), epochs((0.1, 0.9), 2), epochs((3,), None)
    ((8,), (1, 1), (3,))
    """
    if all(isinstance(epoch, int) for epoch in when):
        return tuple(int(epoch) for epoch in when)
    if max_epochs is None or max_epochs < 0:
        raise ValueError(
            explain(
                "`when` is a share of the epochs, and this fit has no number of them",
                f"when={when[0]}, max_epochs={max_epochs}",
                "pass epochs, or give the Trainer `max_epochs`",
            )
        )
    return tuple(max(min(max(round(share * max_epochs), 1), max_epochs - 1), 0) for share in when)


def require_reached(when: tuple[int, ...], max_epochs: int | None) -> None:
    """Raise unless a fit of so many epochs comes to the last prune; -1 and `None` are no limit."""
    if max_epochs is not None and 0 <= max_epochs <= when[-1]:
        raise ValueError(
            explain(
                "`when` names an epoch that this fit never reaches",
                f"epoch {when[-1]}, counted from 0, with max_epochs={max_epochs}",
                f"prune at epoch {max_epochs - 1} at the latest, or raise max_epochs",
            )
        )


def unfinished(when: Sequence[float], missed: Sequence[float]) -> str:
    """Write that a fit ended before its last prune."""
    return explain(
        "the fit ended before StructuredPruning had done all of its steps",
        f"{len(when) - len(missed)} of {len(when)}, with epochs {list(missed)} still to come",
        "resume from a checkpoint of this fit, or prune earlier",
    )


def check(schedule: Any, steps: int) -> None:
    """Raise unless a schedule is known, and fits the number of steps.

    Raises:
        TypeError: It is no text.
        ValueError: It is another one, or has one step only.
    """
    one_of("schedule", schedule, SCHEDULES)
    if schedule == "one_shot" and steps > 1:
        raise ValueError(
            explain(
                "schedule='one_shot' prunes once",
                f"{steps} epochs in `when`",
                "pass one epoch, or schedule='linear'",
            )
        )


def share_gone(ratio: float, step: int, steps: int, schedule: str = "linear") -> float:
    """Return the share that is gone after `step` of `steps`, of what there was before the first.

    Args:
        ratio: Share that is gone after the last step; reached exactly.
        step: Steps that are done, 0 to `steps`.
        steps: Number of steps.
        schedule: One of `SCHEDULES`.

    >>> [round(share_gone(0.6, step, 3, "cubic"), 3) for step in (0, 1, 2, 3)]
    [0.0, 0.422, 0.578, 0.6]
    """
    return ratio if step == steps else _GONE[schedule](ratio, step / steps)


def share_left(kept: float, step: int, steps: int, schedule: str = "linear") -> float:
    """Return the share to keep after `step` of `steps`, falling from 1 to `kept`.

    >>> [share_left(0.4, step, 3) for step in (0, 1, 3)]
    [1.0, 0.8, 0.4]
    >>> [round(share_left(0.125, step, 3, "iterative"), 6) for step in (0, 1, 2, 3)]
    [1.0, 0.5, 0.25, 0.125]
    """
    return kept if step == steps else 1.0 - share_gone(1.0 - kept, step, steps, schedule)
