"""What is worth trying for a module on a device, in which order, and why the rest is not.

The order is that of coordinate search: what changes most comes first, so that later choices are measured on
top of it. Each technique tells its own values; a rule of thumb may put something on this list, and only a measurement
takes it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from lightning_accel.bridge.technique import Situation
from lightning_accel.errors import explain
from lightning_accel.tuning.settings import TECHNIQUES, TRIED


class SkippedCandidate(NamedTuple):
    """A value that is not tried, and why."""

    technique: str
    value: str
    reason: str


class SearchSpace(NamedTuple):
    """Values of one technique to measure side by side."""

    technique: str
    values: tuple[str, ...]


def check_techniques(techniques: object) -> tuple[str, ...]:
    """Return the techniques to try, all by default, or raise and list the known ones.

    >>> check_techniques(["fused_optimizer", "precision"])
    ('precision', 'fused_optimizer')
    """
    if techniques is None:
        return TECHNIQUES
    given = [techniques] if isinstance(techniques, str) else techniques
    known = ", ".join(repr(name) for name in TECHNIQUES)
    if not isinstance(given, Collection) or not all(isinstance(t, str) for t in given):
        raise TypeError(
            explain("`techniques` are names", repr(techniques), f"pass some of {known}")
        )
    odd = sorted(set(given) - set(TECHNIQUES))
    if odd or not given:
        raise ValueError(
            explain("unknown `techniques`", ", ".join(odd) or "none", f"pass some of {known}")
        )
    return tuple(name for name in TECHNIQUES if name in given)


def find(
    situation: Situation, techniques: tuple[str, ...] = TECHNIQUES
) -> tuple[list[SearchSpace], list[SkippedCandidate]]:
    """Return the values to measure for each technique but data loading, and those left out.

    Args:
        situation: Where one would tune.
        techniques: Those to try.
    """
    present = {type(callback).__name__ for callback in situation.trainer.callbacks}  # type: ignore[attr-defined]
    contests: list[SearchSpace] = []
    skipped: list[SkippedCandidate] = []
    for technique in TRIED:
        name = technique.name
        if name not in techniques:
            continue
        if technique.__name__ in present:
            skipped.append(
                SkippedCandidate(name, "any", f"the Trainer already has {technique.__name__}")
            )
            continue
        found = list(technique.candidates(situation))
        skipped += [SkippedCandidate(name, *one) for one in found if not isinstance(one, str)]
        values = tuple(one for one in found if isinstance(one, str))
        if values:
            contests.append(SearchSpace(name, values))
    return contests, skipped
