"""All ways to run a network side by side: times in turns, and how far the numbers are from those of plain."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_accel.cli import ways
from lightning_accel.cli.ways import INFERENCE, TRAINING, Made, Way
from lightning_accel.compilation.difference import difference
from lightning_accel.errors import AccelError
from lightning_accel.exact import exact
from lightning_accel.measure.race import BenchmarkCase, Ratio, no_speedup, synchronise
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call, numbers, same_random_state
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.tuning.benchmark_pool import BenchmarkPool
from lightning_accel.tuning.settings import BASELINE

AGAIN = "plain, again"
_LEAST = 1.02
_RACE = 0.25
"""Share of the budget that belongs to the race of a mode."""
_BLOCK_S = 0.02
_SEED = 0
_LOST = {
    INFERENCE: "outputs of the plain network are NaN or infinite, so what is off cannot be known",
    TRAINING: "loss or gradients of the plain network are NaN or infinite: it learns nothing, and what is off cannot be known",
}
_COMPILES_S = 8.0
"""About what compiling takes at least; with less left of the budget it is not begun."""


class Row(NamedTuple):
    """A way in a mode.

    Attributes:
        way: Its name.
        mode: "inference" or "training".
        ms: Milliseconds of a call.
        gain: Over plain.
        difference: Of outputs, or of gradients, from those of plain: norm by norm. `None` where they cannot be compared.
        first_s: Seconds until it first answered: what it takes to make it.
        verdict: Why this is no gain, or what stands in the way; "" for a gain.
    """

    way: str
    mode: str
    ms: float | None = None
    gain: Ratio | None = None
    difference: float | None = None
    first_s: float | None = None
    verdict: str = ""


class Raced(NamedTuple):
    """All rows, and what is to be said of the measurement."""

    rows: list[Row]
    notes: list[str]
    still: dict[str, Ratio]


def race_ways(
    network: nn.Module,
    calls: Sequence[Call],
    *,
    modes: Sequence[str] = (INFERENCE, TRAINING),
    budget_s: float = 60.0,
    choices: Sequence[Way] = ways.WAYS,
    say: Callable[[str], None] = lambda _: None,
) -> Raced:
    """Measure each way beside plain on copies; the network itself is left alone.

    Args:
        network: Any, where it is to run.
        calls: What it takes.
        modes: What to measure.
        budget_s: About how long; what is begun is ended.
        choices: The ways.
        say: Told what is being done.

    Raises:
        AccelError: The network makes nothing that can be trained.
        Exception: What the network itself raises on the example.
    """
    end = time.perf_counter() + budget_s
    found = Raced([], [], {})
    with preserve_rng(network):
        for number, mode in enumerate(modes):
            left = (end - time.perf_counter()) / (len(modes) - number)
            try:
                _Mode(network, calls, mode, max(0.0, left), say).run(choices, found)
            except AccelError as error:  # of a network without weights that learn
                if not found.rows and number == len(modes) - 1:
                    raise
                found.notes.append(f"{mode}: left out: {error}")
    return found


class _Mode:
    """One mode: makes all ways, and lets them run in turns."""

    def __init__(
        self,
        network: nn.Module,
        calls: Sequence[Call],
        mode: str,
        budget_s: float,
        say: Callable[[str], None],
    ) -> None:
        self._network, self._calls, self._mode, self._say = network, calls, mode, say
        self._is_lost = False
        self._budget_s, self._end = budget_s, time.perf_counter() + budget_s
        self._device = next((p.device for p in network.parameters()), torch.device("cpu"))

    def run(self, choices: Sequence[Way], found: Raced) -> None:
        """Add the rows of this mode."""
        base = self._made()
        wanted, base_s = self._first(base)
        if self._is_lost:
            found.notes.append(f"{self._mode}: {_LOST[self._mode]}")
        again = self._made()
        self._first(again)
        lanes: dict[str, Made] = {BASELINE: base, AGAIN: again}
        rows = {BASELINE: Row("plain", self._mode, difference=0.0, first_s=base_s)}
        for way in choices:
            if self._mode not in way.modes:
                continue
            self._say(f"{self._mode}, {way.name}")
            rows[way.name] = self._tried(way, lanes, wanted)
        self._say(f"{self._mode}, all in turns")
        self._raced(lanes, rows, found)

    def _made(self) -> Made:
        return ways.plain(twin(self._network), self._calls, self._mode)

    def _tried(self, way: Way, lanes: dict[str, Made], wanted: Any) -> Row:
        left = self._end - time.perf_counter() - _RACE * self._budget_s
        if way.compiles and left < _COMPILES_S:
            why = f"not tried: {max(0.0, left):.0f} s of the budget were left; pass a larger --budget-s"
            return Row(way.name, self._mode, verdict=why)
        try:
            start = time.perf_counter()
            made = self._made()
            way.edit(made, self._device)
            result, _ = self._first(made)
        except Exception as error:  # whatever a network does under a technique; it is told
            return Row(way.name, self._mode, verdict=ways.reason(error))
        lanes[way.name] = made
        off = _difference(result, wanted)
        return Row(way.name, self._mode, difference=off, first_s=time.perf_counter() - start)

    def _first(self, made: Made) -> tuple[Any, float]:
        """Run once, and return outputs or gradients and the seconds."""
        start = time.perf_counter()
        with same_random_state(made.network, _SEED), made.around():
            if self._mode == INFERENCE:
                result: Any = made.infer()
                seen = numbers(result)
            else:
                seen = [made.backward()]
                # As one: of layers whose gradients nearly vanish, all that is left is rounding.
                grads = [p.grad for p in made.network.parameters() if p.grad is not None]
                result = torch.cat([exact(g).flatten() for g in grads])
                seen.append(result)
                made.train()
        synchronise(self._device)
        seconds = time.perf_counter() - start
        self._is_lost = not all(t.isfinite().all() for t in seen if t.is_floating_point())
        return result, seconds

    def _raced(self, lanes: dict[str, Made], rows: dict[str, Row], found: Raced) -> None:
        pool = BenchmarkPool(_no_copies, self._device)
        try:
            cases = {}
            for name, made in lanes.items():
                call = made.infer if self._mode == INFERENCE else made.train
                cases[name] = BenchmarkCase(
                    call, self._device, around=made.around, warmup=1, block_s=_BLOCK_S
                )
            left = max(_RACE * self._budget_s, self._end - time.perf_counter())
            failed = pool.race(cases, left)
            still = pool.speedup(cases[BASELINE], cases[AGAIN])
            found.still[self._mode] = still
            found.notes.extend(f"{self._mode}: {note}" for note in pool.notes)
            for name, row in rows.items():
                if name in failed:
                    row = row._replace(verdict=f"failed: {failed[name]}")
                elif name in cases:
                    gain = pool.speedup(cases[BASELINE], cases[name])
                    why = "" if name == BASELINE else no_speedup(gain, still, least=_LEAST)
                    ms = 1000 * pool.seconds(cases[name])
                    row = row._replace(ms=ms, gain=None if name == BASELINE else gain, verdict=why)
                found.rows.append(row)
        finally:
            pool.close()


def _difference(result: Any, wanted: Any) -> float | None:
    off = difference(result, wanted)
    return None if off == float("inf") else off


def _no_copies(*_: Any) -> Any:
    raise AssertionError("the lanes are made before the race")
