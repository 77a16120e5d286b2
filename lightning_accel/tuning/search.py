"""Coordinate search over techniques: each value is measured against the best so far, and has to earn its place.

In each contest the incumbent, a second copy of it and all values of one technique run side by side, see
`measure.race`. A value is taken when

1. it computes the same training (`numerics`),
2. the whole 95 % interval of its gain lies beyond that of the incumbent against itself,
3. what it saves over the rest of the run is more than compiling it costs.

Ties go to the incumbent, and so to plain. At the end plain, plain again and every step of the way run side
by side once more (`waterfall`); what that does not confirm is not used.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from lightning_accel.errors import AccelError
from lightning_accel.measure.race import BenchmarkCase, Ratio, no_speedup
from lightning_accel.progress import progress
from lightning_accel.tuning.benchmark_pool import BenchmarkPool, Build, error_text, forget
from lightning_accel.tuning.candidates import SearchSpace, SkippedCandidate
from lightning_accel.tuning.numerics import (
    Gradients,
    curve_gap,
    curve_verdict,
    furthest,
    verdict,
)
from lightning_accel.tuning.replica import Replica
from lightning_accel.tuning.report import Trial, WaterfallStep
from lightning_accel.tuning.settings import BASELINE, TECHNIQUES, Settings
from lightning_accel.tuning.waterfall import run_waterfall

_LEAST_GAIN = 1.02
"""A gain below this is not worth a setting, however sure it is."""
_AGAIN = "the incumbent again"
_CALLBACK_S = 25e-6
"""What a callback costs the Trainer per step, which a copy does not see (`benchmarks/overhead.py`)."""
_COMPILE_S = 5.0
"""What compiling costs at least on a CPU; a run that cannot win this back is not compiled to find out."""
_AUTOTUNING = 12
"""How many times as much compiling with autotuning takes."""
_BEST_COMPILE = 1.5
_BUDGETS = (0.5, 0.3, 0.1, 0.0)
"""Shares of the activations to keep when plain runs out of memory."""
_SEED = 0

_STEPS_OF_A_LANE = 10
"""What must be left for one more contest and the waterfall, in steps of the fastest so far."""
_FEWEST_STEPS = 40
"""About what a search takes at least, in steps of the module."""


class Unpayable(Exception):
    """The run is too short for a search to pay."""


class SearchResult(NamedTuple):
    """What a search ended with."""

    settings: Settings
    trials: list[Trial]
    bars: list[WaterfallStep]
    resolution: Ratio
    notes: list[str]


class Search:
    """A search over the settings of one training step.

    Args:
        build: Makes a copy of the module under given settings.
        device: Where it trains.
        numerics: The tier that is allowed.
        steps: How many steps the run still has.
        budget_s: About how long to search.
        budget_share: The most of the run's own time that the search may take.
        longest_s: The most time that the run may take.

    Raises:
        Unpayable: By `run`, when that is too little for any answer.
    """

    def __init__(
        self,
        build: Build,
        *,
        device: torch.device,
        numerics: str,
        steps: int,
        budget_s: float,
        budget_share: float = float("inf"),
        longest_s: float = float("inf"),
    ) -> None:
        self._pool = BenchmarkPool(build, device)
        self._tier, self._steps = numerics, steps
        self._start_s = time.perf_counter()
        self._end = self._start_s + budget_s
        self._budget_s, self._budget_share, self._longest_s = budget_s, budget_share, longest_s
        self.trials: list[Trial] = []
        self._still = Ratio(1.0, 1.0, 1.0)
        self._noise_of: dict[Settings, float] = {}
        self._products: dict[Settings, bool] = {}

    def run(self, contests: list[SearchSpace], skipped: list[SkippedCandidate]) -> SearchResult:
        """Search, and leave the number of threads as it was."""
        self.trials = [Trial(s.technique, s.value, "skipped", s.reason) for s in skipped]
        try:
            with progress("searching for faster settings", len(contests) + 1) as self._step:
                return self._search(contests)
        finally:
            self._pool.close()

    def _search(self, contests: list[SearchSpace]) -> SearchResult:
        best = self._base = self._know_plain()
        fixed = dict(best.chosen())
        contests = [space for space in contests if space.technique not in fixed]
        for index, space in enumerate(contests):
            # The last share is for the waterfall, which confirms the whole.
            share_s = self._left_s() / (len(contests) - index + 1)
            self._step(space.technique, by=int(index > 0))
            best = self._contest(best, space, share_s)
        self._step("measuring what was chosen once more", by=1)
        way = [self._base]
        for technique, value in self._in_order(best):
            way.append(way[-1].having(technique, value))
        share_s = self._left_s() if len(way) > 1 else min(self._left_s(), 1.0)
        fall = run_waterfall(self._pool, way, share_s)
        trials = sorted(self.trials, key=lambda trial: TECHNIQUES.index(trial.technique))
        trials = [fall.judged(trial) for trial in trials]
        return SearchResult(fall.settings, trials, fall.bars, fall.still, self._pool.notes)

    def _know_plain(self) -> Settings:
        """Find out what plain computes and how far apart two plain steps are; return what runs at all."""
        base, replica = self._first_that_fits()
        self._require_numbers()
        same, reseeded = (furthest(self._plain, other) for other in self._others)
        self._noise = max(same, reseeded, key=lambda d: (d.loss, -d.cosine, -d.worst))
        if self._noise.loss > 0:
            self._pool.notes.append(
                "the step is random by itself, so numbers are compared within its own noise "
                f"({self._noise})"
            )
        case = self._pool.case(base, replica)
        case.measure()
        self._pool.step_s = self._best_s = case.wall_s[0]
        self._afford()
        return base

    def _require_numbers(self) -> None:
        """Say that steps whose losses are NaN cannot be compared: they are as fast, and each is as wrong as the other."""
        losses = [step.loss for course in (self._plain, *self._others) for step in course]
        if lost := sum(not math.isfinite(loss) for loss in losses):
            self._pool.notes.append(
                f"{lost} of {len(losses)} losses of plain steps are NaN or infinite: whether a faster step computes the "
                "same cannot be known; look at the data, the learning rate and the precision before this table"
            )

    def _first_that_fits(self) -> tuple[Settings, Replica]:
        """Return plain, or where it runs out of memory, the largest activation budget that does not."""
        budgets = [
            Settings(compilation=kind, memory=str(share))
            for share in _BUDGETS
            for kind in ("blocks", "whole")
        ]
        for settings in (Settings(), *budgets):
            if settings != Settings() and time.perf_counter() > self._end:
                break
            try:
                replica = self._pool.make(settings)
                # Before the first step, which changes the weights.
                found = [_course(replica, seed) for seed in (_SEED, _SEED, _SEED + 1)]
                self._plain, self._others = found[0], found[1:]
                replica.first_step()
                if settings != Settings():
                    self._pool.notes.append(
                        f"plain runs out of memory; compared with `{settings.label}`"
                    )
                return settings, replica
            except Exception as error:
                if not isinstance(error, torch.OutOfMemoryError) and settings == Settings():
                    raise
                verdict = Trial("compilation", settings.label, "failed", error_text(error))
                self.trials.append(verdict)
                forget(error)
        raise AccelError(
            "a training step runs out of memory even with a small activation budget",
            f"{len(self.trials)} tries, down to a budget of {_BUDGETS[-1]} where there was time",
            "use a smaller batch, or shard the module over several devices",
        )

    def _afford(self) -> None:
        """Cut the budget to what this run can pay for."""
        run_s = min(self._steps * self._pool.step_s, self._longest_s)
        allowed_s = min(self._budget_s, self._budget_share * run_s)
        if allowed_s < min(self._budget_s, _FEWEST_STEPS * self._pool.step_s):
            share = f"{self._budget_share:.0%}".replace("%", " %")
            raise Unpayable(
                f"not tuned: the {self._steps:,} steps of this run take {run_s:.1f} s, of which a search "
                f"may take {share}; `lightning-accel tune` writes a preset that costs nothing to use"
            )
        self._budget_s, self._end = allowed_s, self._start_s + allowed_s

    def _contest(self, best: Settings, space: SearchSpace, share_s: float) -> Settings:
        """Return the incumbent or a value of this technique that earned its place."""
        values = []
        for value in space.values:
            reason = self._not_worth_trying(best, space.technique, value, share_s)
            if reason:
                self.trials.append(Trial(space.technique, value, "skipped", reason))
            else:
                values.append(value)
        if not values:
            return best
        cases = self._lanes(best, space.technique, values)
        if len(cases) < 2:
            return best
        again = self._second(best)
        failed = self._pool.race(cases if again is None else {**cases, _AGAIN: again}, share_s)
        if again is not None and _AGAIN not in failed:
            self._still = self._pool.speedup(cases[BASELINE], again)
        for name in cases.keys() & failed.keys():
            del cases[name]
            self.trials.append(Trial(space.technique, name, "failed", failed[name]))
        self._best_s = min(self._pool.seconds(case) for case in cases.values())
        ranked = sorted(cases, key=lambda name: self._pool.seconds(cases[name]))
        winner = best
        for name in ranked:
            if name == BASELINE:
                continue
            candidate = best.having(space.technique, name)
            trial = self._judge(space.technique, name, cases, best, candidate)
            if trial.verdict == "taken" and winner is not best:
                trial = trial._replace(verdict="not taken", reason="another value is faster still")
            if trial.verdict == "taken":
                winner = candidate
            self.trials.append(trial)
            if candidate != winner:
                self._pool.drop(candidate)
        return winner

    def _not_worth_trying(self, best: Settings, technique: str, value: str, share_s: float) -> str:
        if self._left_s() < _STEPS_OF_A_LANE * self._best_s:
            return f"the budget of {self._budget_s:.0f} s was spent"
        if technique == "matmul_precision" and best not in self._products:
            try:
                self._products[best] = self._pool.replica(best).has_float32_products()
            except torch.OutOfMemoryError as error:  # then the contest finds out
                forget(error)
                self._products[best] = True
        if technique == "matmul_precision" and not self._products[best]:
            return "the step has no matrix product in float32"
        if technique != "compilation":
            return ""
        cost_s = _COMPILE_S * (_AUTOTUNING if "autotuning" in value else 1)
        rest_s = self._steps * self._pool.step_s
        if rest_s * (1 - 1 / _BEST_COMPILE) < cost_s:
            return (
                f"compiling takes {cost_s:.0f} s or more, and the {self._steps:,} steps of this run "
                f"take {rest_s:.0f} s"
            )
        if share_s < cost_s:
            return f"compiling takes {cost_s:.0f} s or more, and {share_s:.0f} s of the budget are left"
        return ""

    def _lanes(self, best: Settings, technique: str, values: list[str]) -> dict[str, BenchmarkCase]:
        """Make the lanes of the incumbent and of each value; drop what fails or computes something else."""
        cases, used = {BASELINE: self._pool.case(best)}, [best]
        for value in values:
            settings = best.having(technique, value)
            try:
                replica = self._pool.make(settings, keep=used)
                wrong = self._wrong(replica)
                if wrong:
                    self.trials.append(Trial(technique, value, "rejected", wrong))
                else:
                    cases[value] = self._pool.case(settings, replica)
                    used.append(settings)
            except Exception as error:
                self.trials.append(Trial(technique, value, "failed", error_text(error)))
                forget(error)
        return cases

    def _second(self, best: Settings) -> BenchmarkCase | None:
        """Return the incumbent once more, unless that needs memory or a compilation that nobody has."""
        if best["compilation"] != BASELINE:
            return None
        try:
            return self._pool.second(best)
        except torch.OutOfMemoryError as error:
            forget(error)
            return None

    def _wrong(self, replica: Replica) -> str | None:
        start = time.perf_counter()
        found = _course(replica, _SEED)
        replica.first_step_s = time.perf_counter() - start
        return verdict(furthest(self._plain, found), self._noise, self._tier)

    def _judge(
        self,
        technique: str,
        name: str,
        cases: dict[str, BenchmarkCase],
        best: Settings,
        candidate: Settings,
    ) -> Trial:
        ratio = self._pool.speedup(cases[BASELINE], cases[name])
        compile_s = self._pool.compile_s.get(candidate)
        saved_s = self._pool.seconds(cases[BASELINE]) - self._pool.seconds(cases[name])
        pays_after = None
        if compile_s is not None and saved_s > 0:
            pays_after = round(compile_s / saved_s)
        trial = Trial(technique, name, "taken", "", *ratio, compile_s, pays_after)
        curves = [self._pool.replica(settings).losses for settings in (best, candidate)]
        gap = curve_gap(*curves)
        off = curve_verdict(gap, 0.0)
        if off:  # only then it is worth finding out how far rounding alone leads
            off = curve_verdict(gap, self._curve_noise(best))
        if off:
            return trial._replace(verdict="rejected", reason=off)
        none = no_speedup(ratio, self._still, least=_LEAST_GAIN)
        if none:
            return trial._replace(verdict="not taken", reason=none)
        if technique != "precision" and saved_s < _CALLBACK_S:
            return trial._replace(
                verdict="not taken",
                reason=f"it saves {1e6 * saved_s:.0f} us per step, as much as one more callback costs",
            )
        if pays_after is not None and pays_after >= self._steps:
            return trial._replace(
                verdict="not taken",
                reason=f"compiling pays after {pays_after:,} steps, and this run has {self._steps:,}",
            )
        return trial

    def _curve_noise(self, settings: Settings) -> float:
        """Return how far a learning curve moves when its first weights move by rounding."""
        if settings not in self._noise_of:
            try:
                self._noise_of[settings] = self._moved_gap(settings)
            except torch.OutOfMemoryError as error:  # no room for a third copy
                forget(error)
                self._noise_of[settings] = 0.0
        return self._noise_of[settings]

    def _moved_gap(self, settings: Settings) -> float:
        curve = self._pool.replica(settings).losses
        moved = self._pool.build(settings.having("compilation", BASELINE))
        moved.perturb()
        # As many steps as are compared, and no more seconds than a tenth of the budget.
        end = time.perf_counter() + self._budget_s / 10
        while len(moved.losses) < len(curve) and time.perf_counter() < end:
            with moved.around(_SEED + len(moved.losses)):
                moved.step()
        return curve_gap(curve, moved.losses)

    def _left_s(self) -> float:
        return max(0.0, self._end - time.perf_counter())

    def _in_order(self, best: Settings) -> list[tuple[str, str]]:
        """Return the chosen values in the order in which they were taken."""
        taken = [t.technique for t in self.trials if t.verdict == "taken"]
        before = dict(self._base.chosen())
        added = [item for item in best.chosen() if item[0] not in before]
        return sorted(added, key=lambda item: taken.index(item[0]))


def _course(replica: Replica, seed: int) -> list[Gradients]:
    return [Gradients(*each) for each in replica.course(seed)]
