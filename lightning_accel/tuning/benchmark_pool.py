"""Where copies of a module compete: each is built once, and all run side by side under equal conditions.

On a busy machine a race is begun once more; if that is no better, the rest runs in one thread and on processor
time, whose ratios stay right, and the notes say so.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection

import torch

from lightning_accel.bridge.example import StepFailed
from lightning_accel.errors import AccelError
from lightning_accel.measure.contention import Load
from lightning_accel.measure.race import BenchmarkCase, Ratio, p10, run, speedup
from lightning_accel.tuning.replica import Replica
from lightning_accel.tuning.settings import BASELINE, Settings

_BLOCK_S = 0.02
_MOST_ROUNDS = 20
_LOOK = 2
"""Rounds after which one looks whether the machine is busy."""
_SLOW_S = 0.2
"""Steps that take longer get three rounds at least, shorter ones five."""

Build = Callable[[Settings], Replica]


class BenchmarkPool:
    """Keeps one lane per settings, and measures lanes side by side.

    Args:
        build: Makes a copy of the module under given settings.
        device: Where it trains.
    """

    def __init__(self, build: Build, device: torch.device) -> None:
        self.build, self.device = build, device
        self.notes: list[str] = []
        self.compile_s: dict[Settings, float] = {}
        self.step_s = 0.0
        self._clock = "wall"
        self._baseline: str | None = BASELINE
        self._made: dict[Settings, tuple[BenchmarkCase, Replica]] = {}
        self._second: tuple[Settings, BenchmarkCase] | None = None
        self._threads = torch.get_num_threads()

    def close(self) -> None:
        """Let go of all copies, and give the process its threads back."""
        self.clear()
        torch.set_num_threads(self._threads)

    def clear(self) -> None:
        """Let go of all copies."""
        self._made.clear()
        self._second = None
        gc.collect()

    def drop(self, settings: Settings) -> None:
        """Let go of one copy."""
        self._made.pop(settings, None)

    def replica(self, settings: Settings) -> Replica:
        """Return the copy whose lane is kept."""
        return self._made[settings][1]

    def make(self, settings: Settings, keep: Collection[Settings] = ()) -> Replica:
        """Build a copy; short of memory, first let go of all that are only kept for later.

        Args:
            settings: Of the copy.
            keep: Settings whose copies are in use.
        """
        try:
            return self.build(settings)
        except torch.OutOfMemoryError as error:
            spare = [made for made in self._made if made not in keep]
            if not spare and self._second is None:
                raise
            self._second = None
            for made in spare:
                del self._made[made]
            forget(error)
            return self.build(settings)

    def case(self, settings: Settings, replica: Replica | None = None) -> BenchmarkCase:
        """Return the lane of these settings: the same one for as long as it is kept."""
        if settings in self._made:
            case = self._made[settings][0]
            case.wall_s, case.cpu_s = [], []
            return case
        replica = replica or self.make(settings)
        first_s = replica.first_step_s + replica.first_step()
        case = self._lane_of(replica)
        if settings["compilation"] != BASELINE and settings not in self.compile_s:
            start = time.perf_counter()
            with replica.around():
                replica.step()
            self.compile_s[settings] = max(0.0, first_s - 2 * (time.perf_counter() - start))
        self._made[settings] = case, replica
        return case

    def second(self, settings: Settings) -> BenchmarkCase:
        """Return a second lane of these settings, over another copy: the same for as long as it is kept."""
        if self._second is None or self._second[0] != settings:
            self._second = None
            replica = self.build(settings)
            replica.first_step()
            self._second = settings, self._lane_of(replica)
        case = self._second[1]
        case.wall_s, case.cpu_s = [], []
        return case

    def _lane_of(self, replica: Replica) -> BenchmarkCase:
        return BenchmarkCase(
            replica.step, self.device, around=replica.around, warmup=0, block_s=_BLOCK_S
        )

    def race(
        self, cases: dict[str, BenchmarkCase], share_s: float, *, drops: bool = True
    ) -> dict[str, str]:
        """Measure lanes, `BASELINE` among them, and return why those failed that did.

        If the first rounds see a busy machine twice, the rest is in one thread and processor time.

        Args:
            cases: By name.
            share_s: About how long.
            drops: Whether lanes that are hopelessly slower leave after some rounds.
        """
        self._baseline = BASELINE if drops else None
        self._failed: dict[str, str] = {}
        for attempt in ("first", "again"):
            left = {name: case for name, case in cases.items() if name not in self._failed}
            load = self._rounds(left, share_s / 8, fewest=_LOOK)
            if self.device.type != "cpu" or self._clock == "cpu" or not load.contended:
                break
            for case in cases.values():
                case.wall_s, case.cpu_s = [], []
            if attempt == "again":
                torch.set_num_threads(1)
                self._clock = "cpu"
                self.notes.append(
                    f"other work took the processor ({load}): measured in one thread, in processor time"
                )
        done = max(len(case.wall_s) for case in cases.values())
        fewest = 3 if self.step_s > _SLOW_S else 5
        left = {name: case for name, case in cases.items() if name not in self._failed}
        self._rounds(left, 3 * share_s / 4, fewest=max(0, fewest - done))
        return self._failed

    def _fail(self, name: str, error: Exception) -> None:
        self._failed[name] = error_text(error)
        forget(error)

    def speedup(self, baseline: BenchmarkCase, candidate: BenchmarkCase) -> Ratio:
        """Return the gain of one lane over another, by the clock that is right here."""
        return speedup(baseline, candidate, clock=self._clock)

    def seconds(self, case: BenchmarkCase) -> float:
        """Return the seconds of a step, by the clock that is right here."""
        return p10(case, clock=self._clock)

    def _rounds(self, cases: dict[str, BenchmarkCase], share_s: float, fewest: int) -> Load:
        return run(
            cases,
            budget_s=share_s,
            baseline=self._baseline,
            fewest_rounds=fewest,
            most_rounds=_MOST_ROUNDS,
            clock=self._clock,
            on_error=self._fail,
        )


def error_text(error: BaseException) -> str:
    """Say an error in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    cause = error.__cause__ if isinstance(error, StepFailed) and error.__cause__ else error
    line = next(iter(str(cause).strip().splitlines()), "")
    return line if isinstance(cause, AccelError) else f"{type(cause).__name__}: {line}"


def forget(error: BaseException) -> None:
    """Let go of the frames of an error, which hold the tensors of the failed step."""
    error.__traceback__ = None
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
