"""The largest network that meets a share, found with few looks at what would be left.

Every function takes `left`, which says what share a removal leaves. A larger share of channels removes
more, so bisection finds the place; there, groups of equal width lose a channel at the same share, and a
target may need only some of these. So removals of neighbouring shares are mixed, group by group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from lightning_accel.pruning.graph import RemovedUnits

Pick = Callable[[float], RemovedUnits]
"""What goes when this share of the channels is to go; a larger share removes no less."""
Left = Callable[[RemovedUnits], float]
"""The share of something that is left then."""

_STEPS, _TRIES = 12, 10
_EXTRA = (0.0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4)  # of the channels
_CLOSE = 0.99  # of the share; nothing is gained by coming nearer
MOST = 1.0 - 2.0**-_STEPS
"""The largest share of channels that is ever asked for."""


class Bracket(NamedTuple):
    """A share of channels that meets a target, its removal, and the next smaller one, which does not."""

    ratio: float
    enough: RemovedUnits
    too_little: RemovedUnits


def bisect(pick: Pick, left: Left, share: float) -> Bracket:
    """Return where an exact and cheap `left` first meets the share; `pick(MOST)` must meet it.

    >>> found = bisect(lambda r: {"a": range(int(100 * r))}, lambda g: 1 - len(g["a"]) / 100, 0.5)
    >>> len(found.enough["a"]), len(found.too_little["a"])
    (50, 49)
    """
    above, below = 0.0, MOST
    too_little: RemovedUnits = {}
    enough = pick(below)
    for _ in range(_STEPS):
        middle = (above + below) / 2
        gone = pick(middle)
        if same(gone, enough) or (not same(gone, too_little) and left(gone) <= share):
            below, enough = middle, gone
        else:
            above, too_little = middle, gone
    return Bracket(below, enough, too_little)


def closest(groups: Sequence[Any], pick: Pick, left: Left, share: float) -> RemovedUnits:
    """Return the removal that leaves most of what the share allows, for an exact and cheap `left`.

    A little more than enough is taken, and given back group by group, the most expensive first.
    """
    bracket = bisect(pick, left, share)
    best, most = bracket.enough, left(bracket.enough)
    for extra in _EXTRA:
        if most >= _CLOSE * share:
            break
        mixed = pick(min(bracket.ratio + extra, MOST))
        movable = list(_movable(groups, mixed, bracket.too_little))
        movable.sort(key=lambda names: -left(_with(mixed, bracket.too_little, names)))
        for names in movable:
            tried = _with(mixed, bracket.too_little, names)
            if left(tried) <= share:
                mixed = tried
        if most < left(mixed) <= share:
            best, most = mixed, left(mixed)
    return best


def measured(
    groups: Sequence[Any], pick: Pick, left: Left, share: float, *, start: float, slack: float
) -> RemovedUnits:
    """Return a removal that leaves about the share, for a noisy and expensive `left`.

    Stops as soon as two looks at a removal lie within `slack` of the share on average. Where that is not
    possible, because time moves in steps of many channels, only some groups take the last step.

    Args:
        groups: The groups that may shrink.
        pick: What goes for a share of the channels.
        left: What is left; `pick(MOST)` must meet the share.
        share: What may be left.
        start: Share of the channels to begin with.
        slack: Share of the share.
    """
    below, above, ratio = MOST, 0.0, start
    enough, too_little = pick(MOST), dict[str, Sequence[int]]()
    least, most = left(enough), 1.0

    def is_close(value: float) -> bool:
        return abs(value / share - 1) <= slack

    for _ in range(_TRIES):
        gone = {**pick(ratio)}
        if same(gone, enough) or same(gone, too_little):
            value = least if same(gone, enough) else most
        else:
            value = left(gone)
            if is_close(value) and is_close(value := (value + left(gone)) / 2):
                return gone
        if value <= share:
            below, least, enough = ratio, value, gone
        else:
            above, most, too_little = ratio, value, gone
        # Where a straight line through both sides would meet the share, but well inside.
        place = (most - share) / max(most - least, 1e-9)
        ratio = above + (below - above) * min(max(place, 0.15), 0.85)
    return _partly(list(_movable(groups, enough, too_little)), enough, too_little, left, share)


def same(one: RemovedUnits, other: RemovedUnits) -> bool:
    """Whether two removals take the same units."""
    return {n: list(u) for n, u in one.items()} == {n: list(u) for n, u in other.items()}


def _partly(
    parts: list[list[str]], enough: RemovedUnits, too_little: RemovedUnits, left: Left, share: float
) -> RemovedUnits:
    meets, misses, best = 0, len(parts), enough
    while misses - meets > 1:
        middle = (meets + misses) // 2
        tried = _with(enough, too_little, [name for names in parts[:middle] for name in names])
        if left(tried) <= share:
            meets, best = middle, tried
        else:
            misses = middle
    return best


def _movable(groups: Sequence[Any], gone: RemovedUnits, less: RemovedUnits) -> Iterator[list[str]]:
    """Yield the names of groups in which two removals differ, those together that must stay equal."""
    parts: dict[Any, list[str]] = {}
    for group in groups:
        parts.setdefault(group.name if group.link is None else group.link, []).append(group.name)
    for names in parts.values():
        if not same(_with(gone, less, names), gone):
            yield names


def _with(gone: RemovedUnits, other: RemovedUnits, names: Sequence[str]) -> RemovedUnits:
    """Return the first removal, but the second one's for the groups of these names."""
    mixed = {**gone, **{name: other.get(name, []) for name in names}}
    return {name: units for name, units in mixed.items() if len(units)}
