"""Which of several points no other beats: the Pareto front of two numbers, each better when lower or when higher."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LOWER = re.compile(
    r"loss|error|perplexity|latency|params|macs|bytes|nll|distance|divergence|entropy|regret"
    r"|(?<![a-z])(err|mae|mse|rmse|r?msle|s?mape|ppl|[wct]er|eer|[km]?fid|kid|lpips|b?ce|kld?|js|e?ce|mce|brier|huber|epe|crps|ms)(?![a-z])"
    r"|_s$",
    re.IGNORECASE,
)
_HIGHER = re.compile(
    r"_per_s\b|ratio_|gain|explained|(?<![a-z])r2(?![a-z])|loss_?less|(error|loss)_free",
    re.IGNORECASE,
)


def pareto_front(
    points: Sequence[tuple[float, float]], *, lower: tuple[bool, bool] = (True, False)
) -> list[int]:
    """Return the places of the points that no other dominates, in the order given.

    One point dominates another when it is as good in both and better in one. Equal points stay together.
    What is not a number dominates nothing and is never on the front.

    Args:
        points: Pairs of numbers.
        lower: Whether less is better, for each of the two.

    >>> pareto_front([(1, 0.9), (2, 0.95), (3, 0.9)])
    [0, 1]
    """
    signs = [1.0 if low else -1.0 for low in lower]
    known = [
        (signs[0] * x, signs[1] * y, i) for i, (x, y) in enumerate(points) if x == x and y == y
    ]
    best = float("inf")
    found: list[int] = []
    at: tuple[float, float] | None = None
    for x, y, place in sorted(known):  # by x; whoever comes later must be better in y
        if y < best or (x, y) == at or not found:
            found.append(place)
            best, at = min(best, y), (x, y)
    return sorted(found)


def is_lower_better(name: str) -> bool:
    """Guess from its name whether less of a number is better.

    >>> [is_lower_better(name) for name in ("val/loss", "val/acc", "final_latency_ms_64", "steps_per_s", "ratio_macs")]
    [True, False, True, False, False]
    >>> [is_lower_better(name) for name in ("val_mae", "test_WER", "val/f1", "mean_iou", "error_free", "val_rmse_0")]
    [True, True, False, False, False, True]
    """
    return _HIGHER.search(name) is None and _LOWER.search(name) is not None
