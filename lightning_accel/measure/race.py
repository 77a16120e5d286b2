"""Several calls measured side by side in one process, losers dropped early.

On a shared machine the time of a call drifts by a fifth within seconds, so calls measured one after
another differ by that much even when they are the same. Short blocks of all, in random order within each
round, see the same disturbances; the ratio of tenth percentiles over rounds is what they disturb least
(at most 6 % on two busy cores, where means one after another were wrong by 23 %).
"""

from __future__ import annotations

import gc
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from lightning_accel.measure.contention import Load, LoadWatcher

_RESAMPLES = 1000
_HOPELESS = 1.25
"""A lane whose best block takes so many times that of the baseline's best is dropped."""

_FAIR = 3
"""Rounds before anyone is dropped."""


class Ratio(NamedTuple):
    """A gain, baseline by candidate: 2.0 means half the time; `low` to `high` is its 95 % interval."""

    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        """Say it with its interval.

        >>> print(Ratio(1.05, 1.02, 1.08))
        1.05x (1.02 to 1.08)
        """
        return f"{self.ratio:.2f}x ({self.low:.2f} to {self.high:.2f})"

    @property
    def edge(self) -> float:
        """Of two equal lanes: what a gain has to lie beyond, whichever of the two came first.

        >>> Ratio(0.9, 0.8, 0.95).edge, Ratio(1.04, 1.02, 1.08).edge
        (1.25, 1.08)
        """
        return max(self.high, 1 / max(self.low, sys.float_info.min), 1.0)


class BenchmarkCase:
    """One call under measurement: how often per block, and the seconds per call of each block.

    Args:
        fn: What to call.
        device: Where it runs; it is synchronised before and after each block.
        around: Gives a context to hold around each block, outside the clock.
        warmup: Calls before the first measured one.
        block_s: How long a block should last at least.
    """

    def __init__(
        self,
        fn: Callable[[], Any],
        device: torch.device,
        *,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        warmup: int = 2,
        block_s: float = 0.004,
    ) -> None:
        self.fn, self.device, self.around = fn, device, around
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self.calls = 1
        with around():
            for _ in range(warmup):
                fn()
        seconds = self._block()[0]
        if seconds < block_s:
            seconds = min(seconds, self._block()[0])
        if device.type != "xla":  # there, a loop without a sync becomes one traced graph
            self.calls = max(1, min(10_000, int(block_s / max(seconds, 1e-7))))

    def measure(self) -> None:
        """Run one block and note its wall and processor seconds per call."""
        wall, cpu = self._block()
        self.wall_s.append(wall / self.calls)
        self.cpu_s.append(cpu / self.calls)

    def best(self, clock: str = "wall") -> float:
        """Return the seconds per call of the shortest block."""
        return min(getattr(self, f"{clock}_s"))

    def _block(self) -> tuple[float, float]:
        fn = self.fn
        with self.around():
            synchronise(self.device)
            collects = gc.isenabled()
            gc.disable()  # as timeit does: a collection hits whoever runs by chance
            try:
                cpu, wall = time.process_time(), time.perf_counter()
                if self.device.type == "xla":
                    held = fn()  # what nobody holds is never computed there
                    synchronise(self.device)
                    del held
                else:
                    for _ in range(self.calls):
                        fn()
                    synchronise(self.device)
                return time.perf_counter() - wall, time.process_time() - cpu
            finally:
                if collects:
                    gc.enable()


def run(
    cases: Mapping[str, BenchmarkCase],
    *,
    budget_s: float,
    baseline: str | None = None,
    fewest_rounds: int = 5,
    most_rounds: int = 2000,
    clock: str = "wall",
    on_error: Callable[[str, Exception], None] | None = None,
) -> Load:
    """Measure lanes in rounds until the budget is spent, and return who used the processor meanwhile.

    Args:
        cases: By name; each round runs one block of each.
        budget_s: When to stop, after `fewest_rounds`.
        baseline: If given, lanes that are hopelessly slower than this one leave after some rounds.
        fewest_rounds: Rounds that are run whatever the budget.
        most_rounds: Rounds after which more would tell nothing.
        clock: Which time decides who is hopeless.
        on_error: Gets the name and the error of a lane that failed, which then leaves; by default, and
            for the baseline, errors are raised.

    >>> a, b = (BenchmarkCase(lambda n=n: sum(range(n)), torch.device("cpu")) for n in (9000, 900))
    >>> _ = run({"a": a, "b": b}, budget_s=0.05)
    >>> len(a.wall_s) == len(b.wall_s) >= 5
    True
    """
    order = random.Random(0)  # of its own: the user's random state is not ours to use
    left = dict(cases)
    watch, end = LoadWatcher(), time.perf_counter() + budget_s
    for count in range(most_rounds):
        if count >= fewest_rounds and time.perf_counter() > end:
            break
        if baseline is not None and len(left[baseline].wall_s) >= _FAIR:
            limit = _HOPELESS * left[baseline].best(clock)
            left = {n: case for n, case in left.items() if case.best(clock) <= limit}
        for name in order.sample(list(left), len(left)):
            try:
                left[name].measure()
            except Exception as error:
                if on_error is None or name == baseline:
                    raise
                del left[name]
                on_error(name, error)
    return watch.load()


def speedup(baseline: BenchmarkCase, candidate: BenchmarkCase, *, clock: str = "wall") -> Ratio:
    """Return the ratio of tenth percentiles over the rounds that both took part in.

    Args:
        baseline: The lane to compare with.
        candidate: The lane in question.
        clock: "wall", or "cpu" for the processor time of this process.
    """
    first, second = (getattr(case, f"{clock}_s") for case in (baseline, candidate))
    return compare(first, second)


def compare(baseline: Sequence[float], candidate: Sequence[float]) -> Ratio:
    """Return how many times as long the baseline took, of one time per round and lane."""
    rounds = min(len(baseline), len(candidate))
    pairs = torch.tensor([baseline[:rounds], candidate[:rounds]], dtype=torch.float64)
    pairs = pairs.clamp_min(sys.float_info.min)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(rounds, (_RESAMPLES, rounds), generator=generator)
    drawn = pairs[:, picks].quantile(0.1, dim=2)  # (2, resamples)
    bounds = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = (drawn[0] / drawn[1]).quantile(bounds).tolist()
    whole = pairs.quantile(0.1, dim=1)
    return Ratio(float(whole[0] / whole[1]), low, high)


def no_speedup(found: Ratio, still: Ratio, *, least: float) -> str:
    """Return why a ratio is no gain to take, or nothing where it is one.

    Args:
        found: The gain in question.
        still: The same thing against itself, from the same race.
        least: A gain below this is not worth a change, however sure it is.

    >>> no_speedup(Ratio(1.05, 1.03, 1.07), Ratio(1.04, 1.02, 1.08), least=1.02)
    'no measurable difference: plain against plain is 1.04x (1.02 to 1.08)'
    >>> no_speedup(Ratio(0.67, 0.66, 0.68), Ratio(1.04, 1.02, 1.08), least=1.02)
    'slower: 0.67x (0.66 to 0.68)'
    >>> no_speedup(Ratio(1.29, 1.25, 1.31), Ratio(1.04, 1.02, 1.08), least=1.02)
    ''
    """
    if found.high < 1 / still.edge:
        return f"slower: {found}"
    if found.low <= still.edge:
        return f"no measurable difference: plain against plain is {still}"
    return "" if found.ratio >= least else f"faster by less than {100 * (least - 1):.0f} %"


def p10(case: BenchmarkCase, *, clock: str = "wall") -> float:
    """Return the tenth percentile of a lane's blocks, in seconds per call."""
    return tenth_percentile(getattr(case, f"{clock}_s"))


def tenth_percentile(times: Sequence[float]) -> float:
    """Return the tenth percentile, which other work disturbs least."""
    return float(torch.tensor(times, dtype=torch.float64).quantile(0.1))


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done what it was given."""
    if device.type == "xla":
        import torch_xla

        torch_xla.sync(wait=True)
    elif device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
