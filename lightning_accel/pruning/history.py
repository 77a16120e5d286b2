"""What a fit has pruned step by step, and without a target how far the next step goes.

A fit with a budget of accuracy and no target gallops: the first step takes `_FIRST_STEP` of the multiply-accumulates
that are left, each that stays within the budget is followed by one half as large again, and after one that is
taken back all are half as large as that, until nothing above `_MIN_STEP` is left to try. What each network scored is
kept on the way: the trade-off between size and score, of which the best pairs are the Pareto points.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from lightning_accel.errors import explain
from lightning_accel.pruning.target import Macs

Entry = dict[str, Any]
"""One prune of a fit, as plain data for a checkpoint."""

_FIRST_STEP, _MIN_STEP, _MAX_STEP = 0.2, 0.02, 0.5
_GROWTH = 1.5


def require_no_schedule(schedule: str) -> None:
    """Raise `ValueError` where a search is given a schedule."""
    if schedule != "linear":
        raise ValueError(
            explain(
                "`schedule` says how a share rises, and pruning as far as a metric allows has none",
                f"schedule={schedule!r}, and neither `ratio` nor `target`",
                "pass one of those, or no schedule",
            )
        )


def done(history: Sequence[Entry], steps: int) -> int:
    """Return how many of the steps have had their turn."""
    return min(int(history[-1]["step"]), steps) if history else 0


def standing(history: Sequence[Entry]) -> list[Entry]:
    """Return the prunes that were not taken back."""
    return [entry for entry in history if "rolled_back" not in entry]


def left(history: Sequence[Entry]) -> float:
    """Return the share of the target's unit that is left since the start of the fit."""
    return math.prod(entry["kept"] for entry in standing(history) if entry["kept"] is not None)


def in_vain(history: Sequence[Entry]) -> list[float]:
    """Return the shares of the present network that were left, and taken back."""
    last = takewhile(lambda entry: "rolled_back" in entry, reversed(history))
    return [entry["kept"] for entry in last]


def note_score(history: Sequence[Entry], score: float) -> None:
    """Keep what the network of now scored."""
    for entry in standing(history)[-1:]:
        entry["score"] = score


def moments(when: Sequence[int], max_epochs: int | None, patience: int) -> tuple[int, ...]:
    """Return the epochs of a search that begins at one: `patience` apart, the last with as many to come.

    Raises:
        ValueError: The fit has no number of epochs.

    >>> moments([4], 10, patience=2), moments([1, 5], 10, patience=2)
    ((4, 6, 8), (1, 5))
    """
    if len(when) > 1:
        return tuple(when)
    if max_epochs is None or max_epochs < 0:
        raise ValueError(
            explain(
                "pruning as far as a metric allows goes on to the end, and this fit has no number of epochs",
                f"when={when[0]}, max_epochs={max_epochs}",
                "give the Trainer `max_epochs`, or pass all epochs of the steps as `when`",
            )
        )
    return tuple(range(when[0], max_epochs - patience + 1, patience)) or tuple(when)


def next_steps(history: Sequence[Entry]) -> Iterator[Macs]:
    """Yield what to leave of the fit's first network next; where that cannot be had, a smaller step.

    >>> [round(step.share, 4) for step in next_steps([])]
    [0.8, 0.9, 0.95, 0.975]
    """
    step, failed = _FIRST_STEP, False
    for entry in history:
        failed = failed or "rolled_back" in entry
        if "rolled_back" in entry:
            step /= 2
        elif not failed:
            step = min(step * _GROWTH, _MAX_STEP)
    while step >= _MIN_STEP:
        yield Macs(left(history) * (1 - step))
        step /= 2


def trade_off(history: Sequence[Entry], first: float | None, mode: str) -> list[Entry]:
    """Return each network that was scored: share of the target's unit, parameters, score, and if none is better.

    Args:
        history: The prunes of the fit.
        first: The score before the first of them.
        mode: "max" where a higher score is better, "min" where a lower one is.
    """
    if first is None or not history:
        return []
    points = [{"kept": 1.0, "params": history[0]["params_before"], "score": first, "epoch": None}]
    for i, entry in enumerate(history):
        if "score" in entry:
            known = None if entry["kept"] is None else left(history[:i]) * entry["kept"]
            point = {"kept": known, "params": entry["params_after"], "score": entry["score"]}
            points.append({**point, "epoch": entry["epoch"]})
    sign = 1 if mode == "max" else -1

    def beats(one: Entry, other: Entry) -> bool:
        gains = (sign * (one["score"] - other["score"]), other["params"] - one["params"])
        return min(gains) >= 0 and max(gains) > 0

    for point in points:
        finite = math.isfinite(point["score"])
        point["pareto"] = finite and not any(beats(other, point) for other in points)
    return points


def describe(points: Sequence[Entry], monitor: str, history: Sequence[Entry]) -> str:
    """Write the trade-off as a small table, the Pareto points marked, and why it ends there."""
    lines = [f"What `{monitor}` was at each size (* none is smaller and better):"]
    for point in points:
        share = (
            "" if point["kept"] is None else f"{point['kept']:7.1%} of the multiply-accumulates, "
        )
        mark = "*" if point["pareto"] else " "
        lines.append(f"  {mark} {share}{point['params']:>12,} parameters: {point['score']:.4g}")
    if history[-1].get("exhausted"):
        back = "rolled_back" in history[-1]
        lines.append("No smaller step was left to try." if back else "Nothing more could go.")
    elif any(next_steps(history)):
        lines.append("The fit ended before the steps did: a longer one may go further.")
    else:
        lines.append(f"Steps of less than {_MIN_STEP:.0%} of what is left are not tried.")
    return "\n".join(lines)
