"""Which way of making batches is the fastest on this machine, beside a step that takes so long.

Rules of thumb backfire: on two cores one worker more took the core that the training step needed, and the
epoch became 16 % slower; with one thread it became 16 % faster. So each way is run for short turns in
random order, every batch followed by arithmetic of the length of a step, on the device and with the
threads of this process. What counts is the time of batch and step together. The user's own way runs twice,
and a gain counts that lies beyond the interval of the two. Ties go to what the user has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import inf
from random import Random
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, SequentialSampler

from lightning_accel.arguments import finite, whole
from lightning_accel.errors import AccelError
from lightning_accel.hardware import num_usable_cores
from lightning_accel.loading.order import EquivalentLoader, stop_workers
from lightning_accel.loading.plan import AS_IS, LoadingPlan
from lightning_accel.loading.resident import ResidentLoader, check_limits, resident
from lightning_accel.loading.rows import Rows, rows
from lightning_accel.loading.tensor_store import (
    TensorStore,
    batch_size_of,
    require_deterministic,
    require_plain,
)
from lightning_accel.loading.workers import with_workers
from lightning_accel.measure.race import Ratio, compare, no_speedup, synchronise, tenth_percentile
from lightning_accel.measure.table import Table
from lightning_accel.progress import progress
from lightning_accel.surgery.preserve import preserve_rng

_ROUNDS = 5
_FEWEST_ROUNDS = 3
_GAIN = 1.03
_HOPELESS = 1.3
_AGAIN = "as is, again"
_MOST_BATCHES = 300
_MATRIX = 128


@dataclass(frozen=True)
class Candidate:
    """One way of making batches: milliseconds of batch and step together in each turn, or why not.

    `gain` is over the user's own way, with its 95 % interval; `reason` says why the way was not taken.
    """

    name: str
    times_ms: tuple[float, ...] = ()
    skipped: str = ""
    gain: Ratio | None = None
    reason: str = ""

    @property
    def step_ms(self) -> float | None:
        """Milliseconds of batch and step together: the tenth percentile of the turns, as in other races."""
        return tenth_percentile(self.times_ms) if self.times_ms else None


@dataclass(frozen=True)
class LoadingChoice:
    """What `choose` found. `ratio` is a gain: the time as it is by the time of what was taken.

    Attributes:
        taken: "as is", "resident", "workers=2" or "workers=2, pinned".
        ratio: At least 1.0, and 1.0 where nothing is to be gained.
        reason: Why this one, in words.
        ways: All that were tried, or skipped with the reason.
        plan: What was taken, as plain data.
    """

    taken: str
    ratio: float
    reason: str
    ways: tuple[Candidate, ...] = ()
    plan: LoadingPlan = AS_IS
    keep_random: bool = True
    store: TensorStore | Rows | None = field(default=None, repr=False, compare=False)

    def apply(self, loader: Any) -> Any:
        """Return `loader`, over the same dataset, in the form that was taken.

        Raises:
            Unsupported: It is another loader than the measured one, and does not allow this form.
        """
        if self.taken == "as is":
            return loader
        if self.store is not None:
            require_plain(loader)
            return ResidentLoader(loader, self.store)
        count = loader.num_workers if self.plan.num_workers is None else self.plan.num_workers
        return with_workers(
            loader, count, pin_memory=self.plan.pin_memory, keep_random=self.keep_random
        )

    def table(self) -> Table:
        """List the ways with their times and ratios.

        >>> LoadingChoice("resident", 2.0, "", (Candidate("resident", (1.0,), gain=Ratio(2.0, 1.9, 2.1)),)).table().rows
        (('resident', 1.0, '2.00x (1.90 to 2.10)', ''),)
        """
        rows = tuple(
            (w.name, w.step_ms, None if w.gain is None else str(w.gain), w.skipped or w.reason)
            for w in self.ways
        )
        columns = ["loading", "ms per batch and step", "gain", "why not"]
        return Table(columns, rows, notes=(self.reason,) if self.reason else ())


def choose(
    loader: Any,
    *,
    step_ms: float,
    device: torch.device | str = "cpu",
    budget_s: float = 5.0,
    workers: tuple[int, ...] | None = None,
    hold: bool = True,
    pin: bool = True,
    keep_random: bool = True,
    unchanging: bool = False,
    limit_bytes: int | None = None,
) -> LoadingChoice:
    """Measure ways of making the batches of a DataLoader, and return the one to take.

    Nothing of the user's is left changed: no sampler is iterated, and only a dataset that is nothing but its
    tensors is read, unless it is vouched for.

    Args:
        loader: The user's DataLoader. Another iterable, or an `IterableDataset`, stays as it is.
        step_ms: How long one training step takes alone, in milliseconds.
        device: Where the model is.
        budget_s: When to stop measuring, in seconds; a batch under way is waited for.
        workers: The numbers of workers to try; by default 0, 1, 2, 4 ... below the number of cores.
        hold: Whether holding the dataset in memory may be taken.
        pin: Whether pinned memory may be taken (CUDA only).
        keep_random: Leave the workers alone where items draw random numbers, which would be others.
        unchanging: You vouch that each item stays as it is, whenever and by whomever it is read, and that
            to read it leaves no trace. Then other workers are tried, and other datasets.
        limit_bytes: The most that holding the dataset may take.

    >>> from torch.utils.data import TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=16)
    >>> choose(loader, step_ms=0.0, budget_s=0.2, workers=()).taken in ("as is", "resident")
    True
    """
    _check(step_ms, budget_s, limit_bytes, workers)
    if isinstance(loader, EquivalentLoader):
        loader = loader.loader
    try:
        require_plain(loader)
        if not unchanging:
            rows(loader)
    except AccelError as error:
        return LoadingChoice("as is", 1.0, str(error))
    race = _Race(loader, step_ms, torch.device(device), budget_s)
    with progress("measuring ways to load"), preserve_rng(loader.dataset, loader.collate_fn):
        race.enter("as is", lambda: loader)
        if hold:
            race.enter("resident", lambda: race.held(limit_bytes, unchanging))
        counts = _counts(loader) if workers is None else workers
        counts = counts if unchanging else ()
        moved = _moves(loader) if keep_random and counts else ""
        pins = pin and race.device.type == "cuda"
        for count in counts:
            if count != loader.num_workers:
                plan = LoadingPlan(num_workers=count, pin_memory=pins or None)
                race.enter(plan.label, _other(loader, count, pins or None, moved))
        if pin:
            race.enter("pinned", lambda: _pinned(loader, race.device))
        if len(race.makes) > 1:
            race.enter(_AGAIN, lambda: loader)
        race.run()
    return race.choice(keep_random)


class _Race:
    """Turns of all ways in random order, each with an iterator of its own over lists of our own."""

    def __init__(
        self, loader: DataLoader[Any], step_ms: float, device: torch.device, budget_s: float
    ) -> None:
        self.loader, self.device, self.budget_s = loader, device, budget_s
        self.end = time.perf_counter() + budget_s
        self.step = _step(step_ms, device)
        self.store: TensorStore | Rows | None = None
        self.makes: dict[str, Any] = {}
        self.times: dict[str, list[float]] = {}
        self.skipped: dict[str, str] = {}

    def enter(self, name: str, make: Callable[[], Any]) -> None:
        """Let one more way take part, unless it cannot be made."""
        self.times[name] = []
        try:
            found = make()
            self.makes[name] = found.store.take if isinstance(found, ResidentLoader) else found
        except Exception as error:  # a user's dataset may raise anything; it is told, not hidden
            self.skipped[name] = str(error) if isinstance(error, AccelError) else repr(error)

    def held(self, limit_bytes: int | None, unchanging: bool) -> ResidentLoader:
        """Hold the dataset, within the budget of time; on the device only what is vouched for."""
        there = self.device.type == "cuda" and unchanging
        where = self.device if there else torch.device("cpu")
        limit_s = max(self.budget_s, 0.001)
        try:
            found = resident(self.loader, where, limit_bytes=limit_bytes, limit_s=limit_s)
        except AccelError:
            if where.type == "cpu":
                raise
            found = resident(self.loader, "cpu", limit_bytes=limit_bytes, limit_s=limit_s)
        self.store = found.store
        self.end = time.perf_counter() + self.budget_s
        return found

    def run(self) -> None:
        """Measure until the budget is spent or all rounds are done; drop losers after the first."""
        order = Random(0)
        for turn in range(_ROUNDS):
            best = min((median(times) for times in self.times.values() if times), default=inf)
            names = [
                name
                for name in self.makes
                if name not in self.skipped
                and (
                    turn == 0
                    or name in ("as is", _AGAIN)
                    or median(self.times[name]) <= _HOPELESS * best
                )
            ]
            left = (_ROUNDS - turn) * max(1, len(names))
            for name in order.sample(names, len(names)):
                now = time.perf_counter()
                if now > self.end and self.times["as is"]:
                    return
                self._turn(name, max(0.0, (self.end - now) / left))
                left -= 1

    def choice(self, keep_random: bool) -> LoadingChoice:
        """Take the fastest of those whose gain lies beyond what the user's own way shows against itself."""
        for name, times in self.times.items():
            if not times and name not in self.skipped:
                self.skipped[name] = "the budget was spent before its turn"
        plain, again = self.times["as is"], self.times.get(_AGAIN, [])
        still = compare(plain, again) if plain and again else None
        names = [name for name in self.times if name != _AGAIN]
        ways = [self._way(name, still) for name in names]
        if "as is" in self.skipped:
            reason = f"the loader raised: {self.skipped['as is']}"
            return LoadingChoice("as is", 1.0, reason, tuple(ways))
        others = [way for way in ways[1:] if way.gain is not None and not way.skipped]
        if not others:
            return LoadingChoice("as is", 1.0, "no other way could be measured", tuple(ways))
        best = max(others, key=lambda way: (not way.reason, way.gain))
        if best.reason:
            reason = f"the best other way, {best.name}, gave {best.gain}: {best.reason}"
            return LoadingChoice("as is", 1.0, reason, tuple(ways))
        ways = [way if way is best else _beaten(way) for way in ways]
        return self._taken(best, tuple(ways), keep_random)

    def _way(self, name: str, still: Ratio | None) -> Candidate:
        plain, times = self.times["as is"], self.times[name]
        way = Candidate(name, tuple(times), self.skipped.get(name, ""))
        if not times or not plain or name == "as is":
            return way
        gain = compare(plain, times)
        if len(times) < _FEWEST_ROUNDS or still is None:
            kind = "slower" if gain.ratio < 1 else "too few to tell"
            why = f"{kind}: {gain} in {len(times)} of {_ROUNDS} turns"
        else:
            worst = min(plain) / max(times)  # by chance above 1 once in 252 times
            why = no_speedup(gain, still, least=_GAIN)
            why = why or ("" if worst >= 1 else f"not in every turn, {worst:.2f}x at worst")
        return replace(way, gain=gain, reason=why)

    def _taken(
        self, way: Candidate, ways: tuple[Candidate, ...], keep_random: bool
    ) -> LoadingChoice:
        assert way.gain is not None
        plain_ms, made = ways[0].step_ms, self.makes[way.name]
        reason = f"{way.name} took {way.step_ms:.3g} ms where as it is took {plain_ms:.3g}"
        if way.name == "resident":
            plan = LoadingPlan(in_memory=True)
            return LoadingChoice(way.name, way.gain.ratio, reason, ways, plan, store=self.store)
        own, pins = self.loader.num_workers, made.pin_memory or None
        plan = LoadingPlan(
            num_workers=None if made.num_workers == own else made.num_workers,
            pin_memory=pins if pins != (self.loader.pin_memory or None) else None,
        )
        return LoadingChoice(way.name, way.gain.ratio, reason, ways, plan, keep_random)

    def _turn(self, name: str, seconds: float) -> None:
        running: Any = None
        try:
            running, ahead = self._open(self.makes[name], len(self.times[name]))
            for _ in range(ahead + 1):  # what was made while nobody trained does not count
                self.step(next(running))
            synchronise(self.device)
            start, count = time.perf_counter(), 0
            while count < 2 or (count < _MOST_BATCHES and time.perf_counter() - start < seconds):
                self.step(next(running))
                count += 1
            synchronise(self.device)
            self.times[name].append(1000 * (time.perf_counter() - start) / count)
        except Exception as error:  # a user's dataset may raise anything; it is told, not hidden
            self.skipped[name] = f"it raised {error!r}"
        finally:
            stop_workers(running)

    def _open(self, made: Any, turn: int) -> tuple[Iterator[Any], int]:
        lists = _lists(self.loader, turn)
        if callable(made):
            return map(made, lists), 0
        workers = made.num_workers
        loader = self.loader
        fresh = DataLoader(
            loader.dataset,
            batch_sampler=_Endless(lists),
            num_workers=workers,
            collate_fn=loader.collate_fn,
            pin_memory=made.pin_memory,
            timeout=loader.timeout if workers else 0,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context if workers else None,
            generator=torch.Generator(),
        )
        return iter(fresh), workers * (fresh.prefetch_factor or 0)


def _beaten(way: Candidate) -> Candidate:
    return (
        way
        if way.reason or way.gain is None
        else replace(way, reason="another way is faster still")
    )


class _Endless:
    def __init__(self, lists: Iterator[list[int]]) -> None:
        self._made = lists

    def __iter__(self) -> Iterator[list[int]]:
        return self._made


def _lists(loader: DataLoader[Any], seed: int) -> Iterator[list[int]]:
    """Lists of indices without end, of the user's batch size, in order where the user's are."""
    total, size = len(loader.dataset), batch_size_of(loader)  # type: ignore[arg-type]
    in_order = type(getattr(loader.batch_sampler, "sampler", None)) is SequentialSampler
    choice, first = Random(seed), 0
    while True:
        if in_order:
            yield [(first + i) % total for i in range(size)]
            first = (first + size) % total
        else:
            yield choice.choices(range(total), k=size)


def _step(step_ms: float, device: torch.device) -> Callable[[Any], None]:
    """Return what stands for a training step: the batch moved to the device, and arithmetic there."""
    repeats = 0
    if step_ms > 0:
        with suppress(RuntimeError):  # a device without room: the batches are moved, no more
            a = torch.full((_MATRIX, _MATRIX), 1 / _MATRIX, device=device)
            repeats = max(1, round(step_ms / _product_ms(a, device)))

    def step(batch: Any) -> None:
        if device.type != "cpu":
            tree_map(
                lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, batch
            )
        with torch.inference_mode():
            for _ in range(repeats):
                torch.mm(a, a)

    return step


def _product_ms(a: Tensor, device: torch.device) -> float:
    best = inf
    for _ in range(4):
        synchronise(device)
        start = time.perf_counter()
        for _ in range(20):
            torch.mm(a, a)
        synchronise(device)
        best = min(best, (time.perf_counter() - start) / 20)
    return max(1000 * best, 1e-4)


def _counts(loader: DataLoader[Any]) -> tuple[int, ...]:
    cores = num_usable_cores()
    share = max(1, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    tried = {0, *(2**i for i in range(8) if 2**i < share), share - 1}
    return tuple(sorted(tried - {loader.num_workers}))


def _moves(loader: DataLoader[Any]) -> str:
    """Return why items would be others in another process, or nothing."""
    try:
        require_deterministic(loader)
    except AccelError as error:
        return str(error)
    return ""


def _other(loader: DataLoader[Any], count: int, pin: bool | None, moved: str) -> Callable[[], Any]:
    def make() -> Any:
        if moved:
            raise AccelError(moved)
        return with_workers(loader, count, pin_memory=pin, keep_random=False)

    return make


def _pinned(loader: DataLoader[Any], device: torch.device) -> Any:
    if device.type != "cuda":
        raise AccelError("pinned memory only helps copies to CUDA", f"device {device}")
    if loader.pin_memory:
        raise AccelError("the batches are pinned already")
    return with_workers(loader, loader.num_workers, pin_memory=True)


def _check(step_ms: float, budget_s: float, limit_bytes: int | None, workers: Any) -> None:
    check_limits(limit_bytes, budget_s)
    finite("step_ms", step_ms, least=0.0, unit="milliseconds", do="pass 12.5")
    for count in workers or ():
        whole("workers", count, least=0, do="pass (0, 2)")
