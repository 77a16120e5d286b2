"""How fast candidates are beside the model without a graph: all of them in one process, block by block in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from lightning_accel.measure import race
from lightning_accel.measure.race import BenchmarkCase, Ratio

EAGER = "eager"
_AGAIN = "eager again"


class Pace(NamedTuple):
    """Time of a call and the gain over the model without a graph, at one batch."""

    ms: float
    gain: Ratio
    verdict: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {"ms": self.ms, "gain": list(self.gain), "verdict": self.verdict}


def paces(
    eager: Callable[[], Any],
    candidates: Mapping[str, Callable[[], Any]],
    *,
    least: float,
    budget_s: float = 0.5,
) -> dict[str, Pace]:
    """Measure candidates beside the model, and the model beside itself, which tells how much is noise.

    Args:
        eager: A call of the model.
        candidates: Calls of the others, by name.
        least: The gain that is asked for.
        budget_s: Seconds of measuring, after warming up.

    Returns:
        By name, with a `verdict` for who is not faster; the model is "eager".

    >>> found = paces(lambda: sum(range(9000)), {"less": lambda: sum(range(90))}, least=1.0)
    >>> found["less"].verdict, found["less"].gain.ratio > 5
    ('', True)
    """
    calls = {EAGER: eager, _AGAIN: eager, **candidates}
    lanes = {
        name: BenchmarkCase(_without_gradients(call), torch.device("cpu"))
        for name, call in calls.items()
    }
    race.run(lanes, budget_s=budget_s)
    still = race.speedup(lanes[EAGER], lanes[_AGAIN])
    found = {EAGER: Pace(1e3 * race.p10(lanes[EAGER]), still)}
    for name in candidates:
        gain = race.speedup(lanes[EAGER], lanes[name])
        found[name] = Pace(1e3 * race.p10(lanes[name]), gain, not_faster(gain, still, least))
    return found


def not_faster(gain: Ratio, still: Ratio, least: float) -> str:
    """Return why a candidate does not count as faster, or nothing.

    >>> not_faster(Ratio(0.9, 0.88, 0.92), Ratio(1.0, 0.99, 1.01), 1.0)
    'slower: 0.90x (0.88 to 0.92)'
    >>> not_faster(Ratio(0.9, 0.88, 0.92), Ratio(1.0, 0.99, 1.01), 0.5)
    ''
    """
    if least < 1 and gain.ratio >= least:
        return ""
    return race.no_speedup(gain, still, least=least)


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run
