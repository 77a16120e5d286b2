"""The way from plain to what was chosen, measured once more: plain, plain again and every step side by side.

Contests are measured one after another, each against the best so far. Only here do all stand beside plain at
the same time, so this has the last word: on what is used, and on the one number that is told of each step.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch

from lightning_accel.measure.race import BenchmarkCase, Ratio
from lightning_accel.tuning.benchmark_pool import BenchmarkPool, forget
from lightning_accel.tuning.report import Trial, WaterfallStep
from lightning_accel.tuning.settings import BASELINE, Settings, label_of

_RESTLESS = 0.1
"""A difference between plain and plain that is worth a word."""


class Waterfall(NamedTuple):
    """What was measured: the way, its gains over plain and over the step before, and how far it is real.

    `still` is plain against plain, `bars` end with the last step that is confirmed.
    """

    way: list[Settings]
    gains: list[Ratio]
    steps: list[Ratio]
    still: Ratio
    end: int
    bars: list[WaterfallStep]

    @property
    def settings(self) -> Settings:
        """What is confirmed."""
        return self.way[self.end]

    def judged(self, trial: Trial) -> Trial:
        """Return a trial with the figures of this race, where it was a step of the way."""
        index = self._step_of(trial)
        if trial.verdict != "taken" or index is None:
            return trial
        now, alone = self.steps[index], Ratio(*trial[4:7])  # type: ignore[arg-type]
        trial = trial._replace(ratio=now.ratio, low=now.low, high=now.high)
        if index > self.end:
            why = f"not confirmed: {alone} in its contest; plain against plain is {self.still}"
            return trial._replace(verdict="not taken", reason=why)
        if now.low <= self.still.edge:
            return trial._replace(reason=f"it was {alone} in its contest")
        return trial

    def _step_of(self, trial: Trial) -> int | None:
        """Return the step that brought this value; `None` where several came together."""
        for index in range(1, len(self.way)):
            if (trial.technique, trial.value) in _added(self.way, index):
                return index if len(_added(self.way, index)) == 1 else None
        return None


def run_waterfall(pool: BenchmarkPool, way: list[Settings], share_s: float) -> Waterfall:
    """Measure plain, plain again and every step of the way side by side; keep what is confirmed.

    Args:
        pool: Has most of the copies.
        way: Settings, plain first.
        share_s: About how long to measure.
    """
    try:
        again, cases = _sides(pool, way)
    except torch.OutOfMemoryError as error:
        pool.clear()
        forget(error)
        pool.notes.append("too little memory to measure every step of the way side by side")
        way = list(dict.fromkeys((way[0], way[-1])))
        again, cases = _sides(pool, way)
    named = {str(index): case for index, case in enumerate(cases)}
    pool.race({BASELINE: named.pop("0"), "again": again, **named}, share_s)
    still = pool.speedup(cases[0], again)
    if abs(still.ratio - 1) > _RESTLESS:
        pool.notes.append("the machine is restless: only gains beyond that of plain count")
    equal = Ratio(1.0, 1.0, 1.0)
    gains = [equal, *(pool.speedup(cases[0], case) for case in cases[1:])]
    steps = [equal, *(pool.speedup(*pair) for pair in pairwise(cases))]
    end = _confirmed(gains, steps, still)
    if end < len(way) - 1:
        pool.notes.append(
            f"`{way[-1].label}` was not confirmed ({gains[-1]} of plain, plain against plain is {still}): "
            f"`{way[end].label}` is the answer"
        )
    bars = []
    for index in range(end + 1):
        label = " + ".join(label_of(*item) for item in _added(way, index)) or BASELINE
        ms = 1000 * pool.seconds(cases[index])
        label = f"+ {label}" if index else label
        bars.append(WaterfallStep(label, ms, *gains[index], steps[index].ratio))
    return Waterfall(way, gains, steps, still, end, bars)


def _sides(pool: BenchmarkPool, way: list[Settings]) -> tuple[BenchmarkCase, list[BenchmarkCase]]:
    return pool.second(way[0]), [pool.case(settings) for settings in way]


def _confirmed(gains: list[Ratio], steps: list[Ratio], still: Ratio) -> int:
    """Return how far along the way the gain is real: the last step beyond the noise, or an earlier one as fast.

    >>> real, luck, still = Ratio(2, 1.9, 2.1), Ratio(1.01, 0.98, 1.03), Ratio(1.01, 1, 1.02)
    >>> plain = Ratio(1, 1, 1)
    >>> _confirmed([plain, real, real], [plain, real, luck], still)
    1
    >>> _confirmed([plain, luck], [plain, luck], still)
    0
    """
    end = len(gains) - 1
    while end and not (gains[end].low > still.edge and steps[end].low > still.edge):
        end -= 1
    return next(i for i, found in enumerate(gains) if found.ratio >= gains[end].ratio)


def _added(way: list[Settings], index: int) -> list[tuple[str, str]]:
    before = dict(way[index - 1].chosen()) if index else {}
    return [item for item in way[index].chosen() if item[0] not in before]
