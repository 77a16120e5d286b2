"""Time with its spread: one call alone, or two calls side by side.

Both are run in short blocks of random order, see `race`. Measured with two equal calls on two busy cores,
the largest error of the ratio was 23 % for means one after another, 11 % for interleaved medians and 6 %
for interleaved tenth percentiles; the last is what `Comparison.ratio` is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lightning_accel.measure.race import BenchmarkCase, run, speedup


class LatencyStats(NamedTuple):
    """Milliseconds of one call: median, spread (interquartile range), tenth and ninetieth percentile of blocks."""

    median_ms: float
    spread_ms: float
    p10_ms: float
    num_calls: int
    p90_ms: float = math.nan


class Comparison(NamedTuple):
    """Two calls measured side by side.

    `ratio` is a gain, baseline by candidate: 2.0 means that the candidate needs half the time. `low`
    and `high` bound it with 95 % confidence. `busy` is the share of the wall time during which the
    process really had its threads running, `left` the share of their time that other work left to them, as
    far as that is known (both always 1.0 off the CPU).
    """

    baseline: LatencyStats
    candidate: LatencyStats
    ratio: float
    low: float
    high: float
    busy: float
    left: float = 1.0

    @property
    def contended(self) -> bool:
        """Whether other work took so much of the processor that the numbers deserve doubt."""
        return min(self.busy, self.left) < 0.85


def time_call(
    fn: Callable[[], Any],
    *,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    budget_s: float = 1.0,
) -> LatencyStats:
    """Measure one call; fast ones are repeated within a block, so that the clock does not show.

    Args:
        fn: What to call. `compare` is the better choice where a ratio is wanted.
        device: Where it runs; the device is synchronised before and after each block.
        warmup: Calls before the first measured one, outside the budget.
        budget_s: When to stop, after at least five blocks.

    >>> time_call(lambda: sum(range(100)), budget_s=0.02).median_ms > 0
    True
    """
    case = BenchmarkCase(fn, torch.device(device), warmup=warmup)
    run({"": case}, budget_s=budget_s)
    return _latency(case)


def compare(
    baseline: Callable[[], Any],
    candidate: Callable[[], Any],
    *,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    budget_s: float = 2.0,
) -> Comparison:
    """Measure two calls in short blocks of random order, in one process.

    Args:
        baseline: The call to compare with.
        candidate: The call in question.
        device: Where both run.
        warmup: Calls of each before the first measured one, outside the budget (compilation).
        budget_s: When to stop, after at least five rounds.

    >>> gain = compare(lambda: sum(range(9000)), lambda: sum(range(900)), budget_s=0.05)
    >>> gain.low <= gain.ratio <= gain.high
    True
    """
    device = torch.device(device)
    first, second = (BenchmarkCase(fn, device, warmup=warmup) for fn in (baseline, candidate))
    load = run({"baseline": first, "candidate": second}, budget_s=budget_s)
    shares = (load.busy, load.left) if device.type == "cpu" else (1.0, 1.0)
    return Comparison(_latency(first), _latency(second), *speedup(first, second), *shares)


class Pace:
    """Steps per second over the steps that count, from host clock readings alone.

    A reading is taken after each step and the interval since the reading before is added, unless
    something else happened in between (`pause`). Nothing waits for the device: its queue is bounded,
    so over a window the host goes as fast as the device does, and what the host is ahead at the end
    of one window it was at the start as well.

    Args:
        skip: Intervals to leave out after a `restart`: allocation, compilation, caches.

    >>> pace = Pace(skip=0)
    >>> for now in (0.0, 0.5, 1.0):
    ...     pace.tick(steps=1, samples=8, now=now)
    >>> pace.steps_per_s, pace.samples_per_s
    (2.0, 16.0)
    """

    def __init__(self, skip: int = 3) -> None:
        self.skip = skip
        self.restart()

    def restart(self) -> None:
        """Forget all, and leave the next few intervals out."""
        self._to_skip = self.skip
        self._last: float | None = None
        self.clear()

    def clear(self) -> None:
        """Begin another window."""
        self.steps = self.samples = 0
        self.seconds = 0.0

    def pause(self) -> None:
        """Leave the running interval out: it holds something that is no training step."""
        self._last = None

    def tick(self, *, steps: int, samples: int, now: float) -> None:
        """Note that `steps` optimizer steps on `samples` samples ended at `now`, in seconds."""
        if self._last is not None:
            if self._to_skip:
                self._to_skip -= 1
            else:
                self.seconds += now - self._last
                self.steps += steps
                self.samples += samples
        self._last = now

    @property
    def steps_per_s(self) -> float | None:
        """Optimizer steps per second, or `None` before the first that counts."""
        return self.steps / self.seconds if self.steps and self.seconds > 0 else None

    @property
    def samples_per_s(self) -> float | None:
        """Samples per second of this process, or `None` where they could not be counted."""
        return self.samples / self.seconds if self.samples and self.seconds > 0 else None


def _latency(case: BenchmarkCase) -> LatencyStats:
    times_ms = 1000 * torch.tensor(case.wall_s, dtype=torch.float64)
    quantiles = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
    p10, p25, p50, p75, p90 = times_ms.quantile(quantiles).tolist()
    return LatencyStats(p50, p75 - p25, p10, case.calls * len(case.wall_s), p90)
