"""Time with its spread: one call alone, or two calls side by side.

On a shared machine the time of a call drifts by a fifth within seconds, so two calls measured one
after another differ by that much even when they are the same. Short blocks of both in random order
see the same disturbances. Measured with two equal calls on two busy cores, the largest error of the
ratio was 23 % for means one after another, 11 % for interleaved medians and 6 % for interleaved
tenth percentiles; the last is what `Comparison.ratio` is.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_BLOCK_S = 0.004
_FEWEST_ROUNDS = 5
_MOST_ROUNDS = 2000
_RESAMPLES = 1000


class Latency(NamedTuple):
    """Milliseconds of one call: median, spread (interquartile range) and tenth percentile of blocks."""

    median_ms: float
    spread_ms: float
    p10_ms: float
    num_calls: int


class Comparison(NamedTuple):
    """Two calls measured side by side.

    `ratio` is a gain, baseline by candidate: 2.0 means that the candidate needs half the time. `low`
    and `high` bound it with 95 % confidence. `busy` is the share of the wall time during which the
    process really had its threads running (always 1.0 off the CPU).
    """

    baseline: Latency
    candidate: Latency
    ratio: float
    low: float
    high: float
    busy: float

    @property
    def contended(self) -> bool:
        """Whether other work took so much of the processor that the numbers deserve doubt."""
        return self.busy < 0.85


def time_call(
    fn: Callable[[], Any],
    *,
    device: torch.device | str = "cpu",
    warmup: int = 2,
    budget_s: float = 1.0,
) -> Latency:
    """Measure one call; fast ones are repeated within a block, so that the clock does not show.

    Args:
        fn: What to call. `compare` is the better choice where a ratio is wanted.
        device: Where it runs; the device is synchronised before and after each block.
        warmup: Calls before the first measured one, outside the budget.
        budget_s: When to stop, after at least five blocks.

    >>> time_call(lambda: sum(range(100)), budget_s=0.02).median_ms > 0
    True
    """
    one = _Subject(fn, torch.device(device), warmup)
    _rounds([one], budget_s)
    return one.latency()


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
    >>> gain.ratio > 2
    True
    """
    device = torch.device(device)
    first, second = _Subject(baseline, device, warmup), _Subject(candidate, device, warmup)
    busy = _rounds([first, second], budget_s)
    ratio, low, high = _ratio(first.times_ms, second.times_ms)
    return Comparison(
        first.latency(), second.latency(), ratio, low, high, busy if device.type == "cpu" else 1.0
    )


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync(wait=True)
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


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


class _Subject:
    """One call under measurement: how often per block, and the time per call of each block."""

    def __init__(self, fn: Callable[[], Any], device: torch.device, warmup: int) -> None:
        self.fn = fn
        self.device = device
        self.times_ms: list[float] = []
        self.calls = 1
        for _ in range(warmup):
            fn()
        synchronise(device)
        seconds = min(self._block()[0] for _ in range(2))
        if device.type != "xla":  # there, a loop without a sync becomes one traced graph
            self.calls = max(1, min(10_000, int(_BLOCK_S / max(seconds, 1e-7))))

    def measure(self) -> tuple[float, float]:
        """Run one block and return its wall and processor seconds."""
        wall, cpu = self._block()
        self.times_ms.append(1000 * wall / self.calls)
        return wall, cpu

    def latency(self) -> Latency:
        times = torch.tensor(self.times_ms, dtype=torch.float64)
        p10, p25, p50, p75 = times.quantile(
            torch.tensor([0.1, 0.25, 0.5, 0.75], dtype=torch.float64)
        ).tolist()
        return Latency(p50, p75 - p25, p10, self.calls * len(self.times_ms))

    def _block(self) -> tuple[float, float]:
        fn = self.fn
        synchronise(self.device)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(self.calls):
            fn()
        synchronise(self.device)
        return time.perf_counter() - wall, time.process_time() - cpu


def _rounds(subjects: list[_Subject], budget_s: float) -> float:
    order = random.Random(0)  # of its own: the user's random state is not ours to use
    end = time.perf_counter() + budget_s
    wall = cpu = 0.0
    for count in range(_MOST_ROUNDS):
        if count >= _FEWEST_ROUNDS and time.perf_counter() > end:
            break
        for subject in order.sample(subjects, len(subjects)):
            block_wall, block_cpu = subject.measure()
            wall, cpu = wall + block_wall, cpu + block_cpu
    return min(1.0, cpu / max(wall * torch.get_num_threads(), sys.float_info.min))


def _ratio(baseline_ms: list[float], candidate_ms: list[float]) -> tuple[float, float, float]:
    """Return the ratio of tenth percentiles with its 95 % bootstrap interval over rounds."""
    pairs = torch.tensor([baseline_ms, candidate_ms], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rounds = pairs.shape[1]
    picks = torch.randint(rounds, (_RESAMPLES, rounds), generator=generator)
    p10 = pairs[:, picks].quantile(0.1, dim=2)  # (2, resamples)
    low, high = (
        (p10[0] / p10[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
    whole = pairs.quantile(0.1, dim=1)
    return float(whole[0] / whole[1]), low, high
