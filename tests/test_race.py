"""Calls measured side by side on a clock of the test's own: ratios, losers, failures, and other work."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_accel.measure import contention, race
from lightning_accel.measure.contention import Load, LoadWatcher
from lightning_accel.measure.race import BenchmarkCase, Ratio, p10, run, speedup

CPU = torch.device("cpu")


class Clock:
    """Time that passes only where a test says so; `share` is what of it this process gets to work."""

    def __init__(self) -> None:
        self.now = self.worked = 0.0
        self.share = 1.0

    def spend(self, work_s: float) -> None:
        self.worked += work_s
        self.now += work_s / self.share

    def call(self, seconds: float, noise: float = 0.0, seed: int = 0) -> Callable[[], None]:
        source = random.Random(seed)
        return lambda: self.spend(seconds * (1 + noise * source.random()))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    ticks = SimpleNamespace(perf_counter=lambda: made.now, process_time=lambda: made.worked)
    for module in (race, contention):
        monkeypatch.setattr(module, "time", ticks)
    monkeypatch.setattr(contention, "_busy_seconds", lambda: 0.0)
    return made


def lanes_of(clock: Clock, **seconds: float) -> dict[str, BenchmarkCase]:
    return {name: BenchmarkCase(clock.call(s, 0.1), CPU) for name, s in seconds.items()}


def test_the_ratio_is_that_of_the_true_times(clock: Clock) -> None:
    lanes = lanes_of(clock, a=0.030, b=0.010)
    run(lanes, budget_s=10.0)
    ratio, low, high = speedup(lanes["a"], lanes["b"])
    assert ratio == pytest.approx(3.0, rel=0.03) and low <= ratio <= high
    assert speedup(lanes["b"], lanes["a"]).ratio == pytest.approx(1 / ratio)
    assert p10(lanes["b"]) == pytest.approx(0.010, rel=0.05)


def test_equal_calls_are_no_different(clock: Clock) -> None:
    lanes = {n: BenchmarkCase(clock.call(0.01, 0.2, seed), CPU) for seed, n in enumerate("ab")}
    run(lanes, budget_s=5.0)
    ratio, low, high = speedup(lanes["a"], lanes["b"])
    assert ratio == pytest.approx(1.0, abs=0.03) and low < 1.02 and high > 0.98


def test_a_burst_of_other_work_hits_all_lanes_and_no_ratio(clock: Clock) -> None:
    """Interleaved blocks: the first half of the time everything is three times slower."""

    def slowed(seconds: float) -> Callable[[], None]:
        return lambda: clock.spend(seconds * (3 if clock.now < 2 else 1))

    lanes = {name: BenchmarkCase(slowed(s), CPU) for name, s in (("a", 0.02), ("b", 0.01))}
    run(lanes, budget_s=4.0)
    assert speedup(lanes["a"], lanes["b"]).ratio == pytest.approx(2.0, rel=0.01)


def test_fast_calls_are_repeated_within_a_block(clock: Clock) -> None:
    lane = BenchmarkCase(clock.call(1e-4), CPU, block_s=0.004)
    assert lane.calls == pytest.approx(40, abs=1)
    lane.measure()
    assert lane.wall_s == [pytest.approx(1e-4)]
    assert BenchmarkCase(clock.call(1.0), CPU).calls == 1


def test_the_warm_up_is_not_measured(clock: Clock) -> None:
    calls: list[float] = []

    def first_is_slow() -> None:
        clock.spend(9.0 if len(calls) < 2 else 0.01)
        calls.append(0)

    lane = BenchmarkCase(first_is_slow, CPU, warmup=2)
    run({"": lane}, budget_s=0.0)
    assert max(lane.wall_s) == pytest.approx(0.01)


def test_each_block_is_held_in_its_context_outside_the_clock(clock: Clock) -> None:
    inside: list[bool] = []

    @contextmanager
    def around() -> Iterator[None]:
        clock.spend(5.0)
        inside.append(True)
        yield
        inside.append(False)
        clock.spend(5.0)

    def fn() -> None:
        assert inside[-1]
        clock.spend(0.01)

    lane = BenchmarkCase(fn, CPU, around=around)
    lane.measure()
    assert lane.wall_s == [pytest.approx(0.01)]


def test_the_budget_and_the_fewest_rounds_are_kept(clock: Clock) -> None:
    lanes = lanes_of(clock, a=0.01, b=0.01)
    start = clock.now
    run(lanes, budget_s=3.0)
    assert clock.now - start == pytest.approx(3.0, abs=0.1)
    lanes = lanes_of(clock, a=0.01)
    run(lanes, budget_s=0.0, fewest_rounds=7)
    assert len(lanes["a"].wall_s) == 7
    run(lanes, budget_s=1e9, most_rounds=3)
    assert len(lanes["a"].wall_s) == 10


def test_a_hopeless_lane_leaves_early_and_keeps_its_rounds(clock: Clock) -> None:
    lanes = lanes_of(clock, plain=0.010, close=0.011, slow=0.030)
    run(lanes, budget_s=3.0, baseline="plain")
    assert len(lanes["slow"].wall_s) == 3
    assert len(lanes["close"].wall_s) == len(lanes["plain"].wall_s) > 50
    assert speedup(lanes["plain"], lanes["slow"]).ratio == pytest.approx(1 / 3, rel=0.1)


def test_without_a_baseline_nobody_leaves(clock: Clock) -> None:
    lanes = lanes_of(clock, a=0.01, b=0.05)
    run(lanes, budget_s=1.0)
    assert len(lanes["a"].wall_s) == len(lanes["b"].wall_s)


def test_a_lane_that_fails_leaves_and_the_baseline_must_not(clock: Clock) -> None:
    def failing(after: int) -> Callable[[], None]:
        calls: list[int] = []

        def fn() -> None:
            calls.append(0)
            if len(calls) > after:
                raise torch.OutOfMemoryError("too long a batch")
            clock.spend(0.01)

        return fn

    lanes = {"plain": BenchmarkCase(clock.call(0.01), CPU), "big": BenchmarkCase(failing(6), CPU)}
    said: dict[str, Exception] = {}
    run(lanes, budget_s=0.5, baseline="plain", on_error=said.__setitem__)
    assert list(said) == ["big"] and isinstance(said["big"], torch.OutOfMemoryError)
    assert len(lanes["plain"].wall_s) > 10
    with pytest.raises(torch.OutOfMemoryError):
        run({"big": BenchmarkCase(failing(6), CPU)}, budget_s=0.5, baseline="big", on_error=print)
    with pytest.raises(torch.OutOfMemoryError):
        run({"big": BenchmarkCase(failing(6), CPU)}, budget_s=0.5)


def test_the_order_within_a_round_changes_and_takes_no_random_numbers(clock: Clock) -> None:
    order: list[str] = []

    def named(name: str) -> Callable[[], None]:
        def fn() -> None:
            order.append(name)
            clock.spend(0.01)

        return fn

    before = torch.get_rng_state(), random.getstate()
    lanes = {name: BenchmarkCase(named(name), CPU, warmup=0) for name in "abc"}
    order.clear()
    run(lanes, budget_s=0.0, fewest_rounds=12)
    speedup(lanes["a"], lanes["b"])
    rounds = {tuple(order[i : i + 3]) for i in range(0, 36, 3)}
    assert len(rounds) > 3 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


def test_processor_time_tells_the_ratio_that_the_wall_hides(clock: Clock) -> None:
    """Another process takes all but a tenth of the processor while one of the two runs."""

    def robbed() -> None:
        clock.share = 0.1
        clock.spend(0.01)
        clock.share = 1.0

    lanes = {"plain": BenchmarkCase(clock.call(0.02), CPU), "fast": BenchmarkCase(robbed, CPU)}
    run(lanes, budget_s=2.0, clock="cpu", baseline="plain")
    assert speedup(*lanes.values()).ratio == pytest.approx(0.2, rel=0.01)
    assert speedup(*lanes.values(), clock="cpu").ratio == pytest.approx(2.0, rel=0.01)
    assert len(lanes["fast"].wall_s) > 3  # by the wall clock it were hopeless


def test_a_ratio_is_of_the_rounds_that_both_took_part_in() -> None:
    lanes = [BenchmarkCase(lambda: None, CPU, warmup=0) for _ in range(2)]
    lanes[0].wall_s, lanes[1].wall_s = [4.0, 4.0, 1.0, 1.0], [2.0, 2.0]
    assert speedup(*lanes) == Ratio(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("share", "others", "cores", "threads", "contended"),
    [
        (1.0, 0.0, 2, 2, False),
        (0.5, 1.0, 2, 2, True),
        (0.5, 1.0, 2, 1, False),  # a core to spare
        (0.5, 1.3, 2, 1, True),
        (1.0, 3.1, 8, 4, False),
        (1.0, 4.2, 8, 4, True),
    ],
)
def test_other_work_counts_beyond_the_spare_cores(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    others: float,
    cores: int,
    threads: int,
    contended: bool,
) -> None:
    monkeypatch.setattr(contention, "num_usable_cores", lambda: cores)
    monkeypatch.setattr(contention.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(
        contention, "_busy_seconds", lambda: 100 + clock.worked + others * clock.now
    )
    watch = LoadWatcher()
    clock.share = share
    clock.spend(share * 10.0)
    load = watch.load()
    assert load.wall_s == pytest.approx(10) and load.own_cores == pytest.approx(share)
    assert load.others_cores == pytest.approx(others)
    assert load.contended is contended


def test_where_the_others_are_unknown_ones_own_idle_threads_tell(clock: Clock) -> None:
    watch = LoadWatcher()
    clock.share = 0.5
    clock.spend(1.0)
    load = watch.load()
    assert load.others_cores is None and load.contended and "unknown" in str(load)
    clock.share = 1.0
    watch = LoadWatcher()
    clock.spend(1.0)
    assert not watch.load().contended


@pytest.mark.parametrize("text", ["", "cpu", "cpu a b c d e f g h\n", "cpu 1 2 3\n"])
def test_an_odd_proc_stat_is_unknown(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(contention.Path, "read_text", lambda *_: text)
    assert contention._busy_seconds() == 0.0


def test_idle_and_waiting_are_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """user nice system IDLE IOWAIT irq softirq steal guest guest_nice, in ticks."""
    monkeypatch.setattr(contention.Path, "read_text", lambda *_: "cpu 1 2 4 800 900 8 16 32 1 1\n")
    monkeypatch.setattr(contention.os, "sysconf", lambda _: 1)
    assert contention._busy_seconds() == 1 + 2 + 4 + 8 + 16 + 32


def test_load_is_said_in_words() -> None:
    said: Any = str(Load(1.0, 0.9, 1.1, threads=1, cores=2))
    assert "0.9 of 2 cores" in said and "1.1" in said
