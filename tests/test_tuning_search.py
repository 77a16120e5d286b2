"""The search on a world whose truth is known: steps that cost what a test says, on a clock of its own."""

from __future__ import annotations

import gc
import math
import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_accel.measure import contention, race
from lightning_accel.measure.race import Ratio
from lightning_accel.tuning import Settings, benchmark_pool, search
from lightning_accel.tuning.candidates import TECHNIQUES, SearchSpace, SkippedCandidate
from lightning_accel.tuning.search import Search, SearchResult, Unpayable
from lightning_accel.tuning.settings import label_of

STEP_S = 0.01
PRECISION = SearchSpace("precision", ("bf16-mixed",))
MATMUL = SearchSpace("matmul_precision", ("high", "medium"))
OPTIMIZER = SearchSpace("fused_optimizer", ("fused", "foreach"))
ATTENTION = SearchSpace("attention", ("math",))
COMPILATION = SearchSpace("compilation", ("blocks", "whole"))
ALL = [PRECISION, MATMUL, OPTIMIZER, COMPILATION]


class World:
    """What each setting does to the time of a step, to its numbers, and to memory."""

    def __init__(self) -> None:
        self.now = self.worked = 0.0
        self.share, self.noise = 1.0, 0.02
        self.source = random.Random(0)
        self.step_s = STEP_S
        self.factors: dict[str, float] = {}
        self.compile_s = 0.0
        self.turned: dict[str, float] = {}
        """Radians by which a setting turns the gradient."""
        self.drift: dict[str, float] = {}
        """By how much the loss changes with each step."""
        self.jitter = 0.0
        """Radians by which random numbers of the step turn the gradient."""
        self.on_build: Callable[[Settings], None] = lambda settings: None
        self.on_step: Callable[[Settings, int], None] = lambda settings, count: None
        self.products: Callable[[Settings], bool] = lambda settings: True
        self.steps: dict[Settings, int] = {}
        self.built: list[Settings] = []

    def spend(self, work_s: float) -> None:
        self.worked += work_s
        self.now += work_s / self.share

    def factor(self, settings: Settings, of: Mapping[str, float]) -> float:
        found = 1.0
        for technique, value in settings.chosen():
            found *= of.get(f"{technique} {value}", of.get(technique, 1.0))
        return found

    def total(self, settings: Settings, of: Mapping[str, float]) -> float:
        return sum(of.get(technique, 0.0) for technique, _ in settings.chosen())

    def build(self, settings: Settings) -> Any:
        self.on_build(settings)
        self.built.append(settings)
        return Fake(self, settings)


class Fake:
    """What `Replica` is to the search."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world, self.settings = world, settings
        self.losses: list[Tensor] = []
        self.first_step_s = 0.0
        self.compiled = settings["compilation"] == "plain"
        self.count = 0

    @contextmanager
    def around(self, seed: int | None = None) -> Iterator[None]:
        yield

    def step(self) -> None:
        self._work()
        self.world.on_step(self.settings, self.count)
        self.count += 1
        steps = self.world.steps
        steps[self.settings] = steps.get(self.settings, 0) + 1
        if len(self.losses) < 20:
            drift = self.world.total(self.settings, self.world.drift)
            self.losses.append(torch.tensor(2.0 + drift * self.count))

    def first_step(self) -> float:
        start = self.world.now
        self.step()
        self.first_step_s = self.world.now - start
        return self.first_step_s

    def gradients(self, seed: int) -> tuple[float, dict[str, Tensor]]:
        self._work()
        angle = self.world.total(self.settings, self.world.turned) + self.world.jitter * seed
        turned = torch.tensor(angle)
        gradient = torch.stack([turned.cos(), turned.sin()])
        return 2.0 + float(turned) / 100, {"weight": gradient}

    def course(self, seed: int) -> list[tuple[float, dict[str, Tensor]]]:
        return [self.gradients(seed)]

    def has_float32_products(self) -> bool:
        return self.world.products(self.settings)

    def perturb(self) -> None:
        pass

    def _work(self) -> None:
        world = self.world
        if not self.compiled:
            self.compiled = True
            world.spend(world.compile_s)
        noise = 1 + world.noise * world.source.random()
        world.spend(world.step_s * world.factor(self.settings, world.factors) * noise)


@pytest.fixture(scope="module", autouse=True)
def _quick_garbage() -> Iterator[None]:
    """Keep what was there before out of each collection, of which a search makes many."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World()
    ticks = SimpleNamespace(perf_counter=lambda: made.now, process_time=lambda: made.worked)
    for module in (race, contention, search, benchmark_pool):
        monkeypatch.setattr(module, "time", ticks)
    monkeypatch.setattr(contention, "_busy_seconds", lambda: 0.0)
    return made


def find(
    world: World,
    *contests: SearchSpace,
    skipped: tuple[SkippedCandidate, ...] = (),
    numerics: str = "amp",
    steps: int = 10**6,
    budget_s: float = 60.0,
    budget_share: float = float("inf"),
    longest_s: float = float("inf"),
) -> SearchResult:
    return Search(
        world.build,
        device=torch.device("cpu"),
        numerics=numerics,
        steps=steps,
        budget_s=budget_s,
        budget_share=budget_share,
        longest_s=longest_s,
    ).run(list(contests), list(skipped))


def verdicts(found: SearchResult) -> dict[str, str]:
    return {f"{t.technique} {t.value}": t.verdict for t in found.trials}


def reason(found: SearchResult, value: str) -> str:
    return next(t.reason for t in found.trials if t.value == value)


@pytest.mark.slow
def test_what_is_faster_is_taken_and_the_rest_is_plain(world: World) -> None:
    world.factors = {
        "precision bf16-mixed": 0.5,
        "matmul_precision high": 1.0,
        "matmul_precision medium": 0.8,
        "fused_optimizer fused": 1.1,
        "fused_optimizer foreach": 1.0,
    }
    found = find(world, PRECISION, MATMUL, OPTIMIZER)
    assert found.settings == Settings(precision="bf16-mixed", matmul_precision="medium")
    assert verdicts(found) == {
        "precision bf16-mixed": "taken",
        "matmul_precision high": "not taken",
        "matmul_precision medium": "taken",
        "fused_optimizer fused": "not taken",
        "fused_optimizer foreach": "not taken",
    }
    assert reason(found, "fused").startswith("slower: 0.91x (0.")
    assert "no measurable" in reason(found, "foreach")
    assert found.bars[-1].ratio == pytest.approx(2.5, rel=0.02)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 2.0])
def test_losses_that_are_no_numbers_are_told(
    world: World, loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = Fake.gradients
    monkeypatch.setattr(Fake, "gradients", lambda *given: (loss, gradients(*given)[1]))
    told = [note for note in find(world, budget_s=0.5).notes if "NaN or infinite" in note]
    assert len(told) == (not math.isfinite(loss))


def test_the_waterfall_multiplies_up_in_the_order_of_the_search(world: World) -> None:
    world.factors = {
        "fused_optimizer fused": 0.8,
        "precision bf16-mixed": 0.5,
        "matmul_precision medium": 0.9,
    }
    found = find(world, PRECISION, MATMUL, OPTIMIZER)
    assert [bar.label for bar in found.bars] == [
        "plain",
        "+ bf16-mixed",
        "+ matmul medium",
        "+ fused optimizer",
    ]
    truth = [1.0, 2.0, 2.0 / 0.9, 2.0 / 0.9 / 0.8]
    assert [bar.ratio for bar in found.bars] == pytest.approx(truth, rel=0.02)
    assert [bar.step_ratio for bar in found.bars] == pytest.approx(
        [1.0, 2.0, 1 / 0.9, 1 / 0.8], rel=0.02
    )
    assert found.bars[0].step_ms == pytest.approx(1000 * STEP_S, rel=0.03)
    assert all(bar.low <= bar.ratio <= bar.high for bar in found.bars)
    assert found.resolution.ratio == pytest.approx(1.0, abs=0.01)


def test_a_technique_is_measured_on_top_of_those_before(world: World) -> None:
    """A fused optimizer that helps plain steps, and harms those in bf16."""
    world.factors = {"precision bf16-mixed": 0.5}
    plain = World.factor

    def factor(self: World, settings: Settings, of: Mapping[str, float]) -> float:
        fused = settings["fused_optimizer"] == "fused"
        helps = 0.7 if settings["precision"] == "plain" else 1.3
        return plain(self, settings, of) * (helps if fused else 1.0)

    world.factor = factor.__get__(world)  # type: ignore[method-assign]
    found = find(world, PRECISION, OPTIMIZER)
    assert found.settings == Settings(precision="bf16-mixed")


@pytest.mark.parametrize("factor", [1.0, 0.995, 0.985])
def test_ties_go_to_plain(world: World, factor: float) -> None:
    world.factors = {"precision": factor, "matmul_precision": factor, "fused_optimizer": factor}
    found = find(world, PRECISION, MATMUL, OPTIMIZER)
    assert found.settings == Settings()
    assert [bar.label for bar in found.bars] == ["plain"]


def test_noise_alone_is_never_taken(world: World) -> None:
    world.noise = 0.3
    for seed in range(15):
        world.source.seed(seed)
        assert find(world, PRECISION, MATMUL, OPTIMIZER, budget_s=2.0).settings == Settings()


def twins(world: World, factor: float, after: int = 1) -> None:
    """Let plain copies past so many be `factor` times as slow, as memory that lies elsewhere does."""
    made: list[Any] = []
    build = world.build

    def unequal(settings: Settings) -> Any:
        copy = build(settings)
        if settings == Settings():
            made.append(copy)
            if len(made) > after:
                work = copy._work
                copy._work = lambda: (work(), world.spend((factor - 1) * STEP_S))
        return copy

    world.build = unequal  # type: ignore[method-assign]


@pytest.mark.parametrize("factor", [1.3, 0.7])
def test_a_gain_within_what_plain_differs_from_plain_is_not_taken(
    world: World, factor: float
) -> None:
    """The machine gives the second copy of plain 0.77 or 1.43 of its speed, so 1.18x may be luck."""
    world.factors = {"precision bf16-mixed": 0.85}
    assert find(world, PRECISION).settings == Settings(precision="bf16-mixed")
    twins(world, factor)
    found = find(world, PRECISION)
    assert verdicts(found) == {"precision bf16-mixed": "not taken"} and found.settings == Settings()
    said = reason(found, "bf16-mixed")
    assert "no measurable difference: plain against plain is" in said
    assert f"{1 / factor:.2f}"[:3] in said


def test_five_percent_beside_plain_that_differs_by_four_is_no_gain(world: World) -> None:
    """As in a report of a user: 1.05x, and plain against plain 1.04x (1.02 to 1.08)."""
    world.noise, world.factors = 0.05, {"fused_optimizer fused": 1 / 1.05}
    twins(world, 1 / 1.04)
    found = find(world, SearchSpace("fused_optimizer", ("fused",)))
    trial = found.trials[0]
    assert trial.ratio == pytest.approx(1.05, abs=0.02) and trial.low and trial.low > 1
    assert trial.verdict == "not taken" and "plain against plain is 1.0" in trial.reason


@pytest.mark.parametrize("gain", [0.07, 0.67, 1.29, 1.79])
def test_a_gain_is_called_what_it_is(world: World, gain: float) -> None:
    world.factors = {"fused_optimizer fused": 1 / gain, "fused_optimizer foreach": 1 / 3}
    for values, taken in ((("fused",), "fused"), (("fused", "foreach"), "foreach")):
        found = find(world, SearchSpace("fused_optimizer", values))
        trial = next(t for t in found.trials if t.value == "fused")
        assert trial.ratio == pytest.approx(gain, rel=0.02)
        assert trial.low <= trial.ratio <= trial.high  # type: ignore[operator]
        if gain < 1:
            assert trial.verdict == "not taken"
            assert trial.reason == f"slower: {Ratio(*trial[4:7])}"  # type: ignore[arg-type]
        elif taken == "fused":
            assert (trial.verdict, trial.reason) == ("taken", "")
        else:
            assert trial.verdict == "not taken"
            assert trial.reason == "another value is faster still"


def test_both_tables_give_one_number_to_what_was_taken(world: World) -> None:
    world.noise = 0.3
    world.factors = {
        "precision bf16-mixed": 0.5,
        "fused_optimizer fused": 0.6,
        "matmul_precision medium": 0.5,
    }
    found = find(world, PRECISION, MATMUL, OPTIMIZER, budget_s=5.0)
    taken = [t for t in found.trials if t.verdict == "taken"]
    assert len(taken) == 3 == len(found.bars) - 1
    by_label = {bar.label: bar.step_ratio for bar in found.bars}
    for trial in taken:
        assert trial.ratio == by_label[f"+ {label_of(trial.technique, trial.value)}"]


def test_a_gain_within_what_plain_differs_from_plain_is_not_confirmed(world: World) -> None:
    """Between the contest and the waterfall the machine turned restless."""
    world.factors = {"precision bf16-mixed": 0.85}
    contested: list[Settings] = []
    factor = World.factor

    def later(self: World, settings: Settings, of: Mapping[str, float]) -> float:
        late = len(contested) and settings["precision"] == "bf16-mixed"
        return factor(self, settings, of) * (1.17 if late else 1.0)

    world.factor = later.__get__(world)  # type: ignore[method-assign]
    world.on_build = lambda s: contested.append(s) if s["matmul_precision"] != "plain" else None
    found = find(world, PRECISION, MATMUL)
    trial = next(t for t in found.trials if t.value == "bf16-mixed")
    assert found.settings == Settings() and any("not confirmed" in note for note in found.notes)
    assert trial.verdict == "not taken" and trial.ratio == pytest.approx(1.0, abs=0.02)
    assert "not confirmed: 1.1" in trial.reason and "plain against plain is" in trial.reason


def test_a_step_that_gains_nothing_beside_the_others_says_what_it_gained_alone(
    world: World,
) -> None:
    """Fused steps that help bf16, and no longer beside the products of a third technique."""
    plain = World.factor

    def factor(self: World, settings: Settings, of: Mapping[str, float]) -> float:
        fused = settings["matmul_precision"] == "high" and len(world.built) < 9
        return plain(self, settings, of) * (0.8 if fused else 1.0)

    world.factor = factor.__get__(world)  # type: ignore[method-assign]
    world.factors = {"precision bf16-mixed": 0.5, "fused_optimizer fused": 0.5}
    found = find(
        world,
        PRECISION,
        SearchSpace("matmul_precision", ("high",)),
        SearchSpace("fused_optimizer", ("fused",)),
        ATTENTION,
    )
    trial = next(t for t in found.trials if t.technique == "matmul_precision")
    assert trial.verdict == "taken" and trial.ratio == pytest.approx(1.0, abs=0.02)
    assert "in its contest" in trial.reason and "1.2" in trial.reason


def test_without_memory_for_a_second_copy_the_waterfall_decides(world: World) -> None:
    world.factors = {"precision bf16-mixed": 0.5}
    refused: list[Settings] = []

    def third(settings: Settings) -> None:
        if len(world.built) == 2 and not refused:
            refused.append(settings)
            raise torch.OutOfMemoryError

    world.on_build = third
    found = find(world, PRECISION)
    assert refused == [Settings()], "the second copy of the incumbent, after all that compete"
    assert found.settings == Settings(precision="bf16-mixed") and not found.notes
    assert found.resolution.ratio == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("numerics", "angle", "verdict"),
    [
        ("exact", 0.01, "taken"),
        ("exact", 0.06, "rejected"),
        ("amp", 0.06, "taken"),
        ("amp", 0.2, "rejected"),
        ("low", 0.2, "taken"),
        ("low", 0.5, "rejected"),
        ("low", 3.14, "rejected"),
        ("low", float("nan"), "rejected"),
    ],
)
def test_another_gradient_is_rejected_with_its_figure(
    world: World, numerics: str, angle: float, verdict: str
) -> None:
    world.factors, world.turned = {"precision bf16-mixed": 0.1}, {"precision": angle}
    if numerics == "exact":  # whose loss may differ by 1e-5 only
        own = Fake.gradients
        world.build = lambda s: _with_loss(Fake(world, s), own)  # type: ignore[method-assign]
    found = find(world, PRECISION, numerics=numerics)
    assert verdicts(found) == {"precision bf16-mixed": verdict}
    if verdict == "rejected":
        cosine = f"{torch.tensor(angle).cos():.4f}" if angle == angle else "-1.0000"
        assert cosine in reason(found, "bf16-mixed") and "allowed" in reason(found, "bf16-mixed")
        assert found.settings == Settings()


def _with_loss(fake: Fake, own: Callable[[Fake, int], Any]) -> Fake:
    fake.gradients = lambda seed: (2.0, own(fake, seed)[1])  # type: ignore[method-assign]
    return fake


def test_a_step_that_learns_otherwise_is_rejected_with_its_figure(world: World) -> None:
    world.factors, world.drift = {"precision bf16-mixed": 0.5}, {"precision": 0.05}
    found = find(world, PRECISION)
    assert verdicts(found) == {"precision bf16-mixed": "rejected"}
    assert "learning curve" in reason(found, "bf16-mixed") and "%" in reason(found, "bf16-mixed")


def test_a_random_step_is_compared_within_its_own_noise(world: World) -> None:
    world.factors, world.turned, world.jitter = (
        {"precision bf16-mixed": 0.5},
        {"precision": 0.3},
        0.3,
    )
    found = find(world, PRECISION)
    assert verdicts(found) == {"precision bf16-mixed": "taken"}
    assert any("random by itself" in note for note in found.notes)
    world.turned = {"precision": 1.5}
    assert verdicts(find(world, PRECISION)) == {"precision bf16-mixed": "rejected"}


@pytest.mark.parametrize(("steps", "verdict"), [(20_000, "not taken"), (100_000, "taken")])
def test_compiling_is_charged_against_the_run(world: World, steps: int, verdict: str) -> None:
    """120 s to compile, 4 ms saved per step: it pays after 30 000 steps."""
    world.factors, world.compile_s = {"compilation blocks": 0.6, "compilation whole": 2}, 120.0
    found = find(world, COMPILATION, steps=steps, budget_s=600.0)
    trial = next(t for t in found.trials if t.value == "blocks")
    assert trial.verdict == verdict
    assert trial.pays_after_steps == pytest.approx(30_000, rel=0.05)
    assert trial.compile_s == pytest.approx(120, rel=0.01)
    assert found.settings == (Settings(compilation="blocks") if verdict == "taken" else Settings())
    if verdict != "taken":
        assert f"{trial.pays_after_steps:,}" in trial.reason and f"{steps:,}" in trial.reason


def test_a_run_that_could_never_win_a_compile_back_does_not_try(world: World) -> None:
    found = find(world, COMPILATION, steps=1000)  # 10 s in all
    assert verdicts(found) == dict.fromkeys(("compilation blocks", "compilation whole"), "skipped")
    assert "1,000 steps" in reason(found, "whole")
    assert all(s["compilation"] == "plain" for s in world.built)
    found = find(world, COMPILATION, budget_s=4.0)
    assert "of the budget are left" in reason(found, "whole")


def test_products_that_are_not_in_float32_need_no_precision(world: World) -> None:
    world.factors, world.products = (
        {"precision bf16-mixed": 0.5},
        lambda s: s["precision"] == "plain",
    )
    found = find(world, PRECISION, MATMUL)
    assert verdicts(found)["matmul_precision medium"] == "skipped" and "float32" in reason(
        found, "medium"
    )
    world.factors = {"precision bf16-mixed": 2.0}
    assert verdicts(find(world, PRECISION, MATMUL))["matmul_precision medium"] == "not taken"


@pytest.mark.parametrize(("step_s", "verdict"), [(1e-4, "not taken"), (1e-3, "taken")])
def test_a_saving_below_the_cost_of_a_callback_is_not_taken(
    world: World, step_s: float, verdict: str
) -> None:
    world.step_s, world.factors = step_s, {"fused_optimizer fused": 0.9}
    found = find(world, SearchSpace("fused_optimizer", ("fused",)))
    assert verdicts(found) == {"fused_optimizer fused": verdict}
    assert ("one more callback" in reason(found, "fused")) == (verdict == "not taken")


def test_losers_are_dropped_early(world: World) -> None:
    world.factors = {"matmul_precision high": 3.0, "matmul_precision medium": 0.9}
    find(world, MATMUL)
    high, medium = (world.steps[Settings(matmul_precision=value)] for value in ("high", "medium"))
    assert high < 12 < 30 < medium


def test_the_faster_of_two_values_wins(world: World) -> None:
    world.factors = {"matmul_precision high": 0.7, "matmul_precision medium": 0.8}
    found = find(world, MATMUL)
    assert found.settings == Settings(matmul_precision="high")
    assert reason(found, "medium") == "another value is faster still"


def test_what_is_left_out_is_said_in_the_order_of_the_techniques(world: World) -> None:
    skipped = (
        SkippedCandidate("float8", "tensorwise", "no CUDA"),
        SkippedCandidate("precision", "16-mixed", "slow"),
    )
    found = find(world, OPTIMIZER, MATMUL, skipped=skipped)
    order = [TECHNIQUES.index(t.technique) for t in found.trials]
    assert order == sorted(order) and len(order) == 6
    assert verdicts(found)["float8 tensorwise"] == "skipped"


@pytest.mark.parametrize("when", ["build", "first step", "race"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("no kernel\nfor this")]
)
def test_a_candidate_that_fails_is_survived_and_reported(
    world: World, when: str, error: Exception
) -> None:
    world.factors = {"fused_optimizer fused": 0.5, "fused_optimizer foreach": 0.9}

    def failing(settings: Settings, count: int = 0) -> None:
        if settings["fused_optimizer"] == "fused" and count >= {"first step": 0}.get(when, 5):
            raise error

    if when == "build":
        world.on_build = lambda settings: failing(settings, 9)
    else:
        world.on_step = failing
    found = find(world, OPTIMIZER)
    assert verdicts(found) == {
        "fused_optimizer fused": "failed",
        "fused_optimizer foreach": "taken",
    }
    short = (
        "out of memory" if isinstance(error, torch.OutOfMemoryError) else "ValueError: no kernel"
    )
    assert reason(found, "fused") == short
    assert found.settings == Settings(fused_optimizer="foreach")


@pytest.mark.parametrize("value", ["fused", "foreach"])
def test_out_of_memory_beside_other_copies_lets_those_go_and_tries_again(
    world: World, value: str
) -> None:
    world.factors = {
        "fused_optimizer fused": 0.5,
        "fused_optimizer foreach": 0.9,
        "precision bf16-mixed": 0.5,
    }
    failed: list[Settings] = []

    def short_once(settings: Settings) -> None:
        if settings["fused_optimizer"] == value and not failed:
            failed.append(settings)
            raise torch.OutOfMemoryError

    world.on_build = short_once
    found = find(world, PRECISION, OPTIMIZER, MATMUL)
    assert failed and found.settings == Settings(precision="bf16-mixed", fused_optimizer="fused")
    assert found.bars[-1].ratio == pytest.approx(4.0, rel=0.02)


def test_out_of_memory_in_the_waterfall_leaves_its_ends(world: World) -> None:
    """There is memory for three copies at a time, and the way has four steps and a second plain."""
    world.factors = {
        "precision bf16-mixed": 0.5,
        "matmul_precision medium": 0.5,
        "fused_optimizer fused": 0.5,
    }
    alive: list[Any] = []
    build = world.build

    def three(settings: Settings) -> Any:
        gc.collect()
        alive[:] = [reference for reference in alive if reference() is not None]
        if len(alive) >= 3:
            raise torch.OutOfMemoryError
        made = build(settings)
        alive.append(weakref.ref(made))
        return made

    world.build = three  # type: ignore[method-assign]
    found = find(
        world,
        PRECISION,
        SearchSpace("matmul_precision", ("medium",)),
        SearchSpace("fused_optimizer", ("fused",)),
    )
    assert found.settings == Settings(
        precision="bf16-mixed", matmul_precision="medium", fused_optimizer="fused"
    )
    assert [bar.label for bar in found.bars] == [
        "plain",
        "+ bf16-mixed + matmul medium + fused optimizer",
    ]
    assert found.bars[-1].ratio == pytest.approx(8.0, rel=0.02)
    assert any("too little memory" in note for note in found.notes)


def test_plain_that_does_not_fit_gets_an_activation_budget(world: World) -> None:
    def short(settings: Settings, count: int) -> None:
        if settings["memory"] == "plain" or float(settings["memory"]) > 0.4:
            raise torch.OutOfMemoryError

    world.on_step, world.factors = short, {"precision bf16-mixed": 0.5}
    found = find(world, PRECISION, COMPILATION)
    assert found.settings == Settings(precision="bf16-mixed", compilation="blocks", memory="0.3")
    assert any("out of memory" in note for note in found.notes)


def test_nothing_that_fits_is_said_within_the_budget(world: World) -> None:
    def short(settings: Settings, count: int) -> None:
        raise torch.OutOfMemoryError

    world.on_step, world.compile_s = short, 10.0
    with pytest.raises(RuntimeError, match=r"out of memory.*Do:"):
        find(world, PRECISION, budget_s=20.0)
    assert world.now < 1.6 * 20


def test_an_error_of_plain_is_the_users_own(world: World) -> None:
    def failing(settings: Settings, count: int) -> None:
        raise ZeroDivisionError("mine")

    world.on_step = failing
    with pytest.raises(ZeroDivisionError, match="mine"):
        find(world, PRECISION)


@pytest.mark.parametrize(
    ("step_s", "budget_s"), [(1e-4, 2), (1e-3, 5), (0.03, 10), (0.3, 20), (1.0, 60)]
)
def test_the_budget_is_respected(world: World, step_s: float, budget_s: float) -> None:
    world.step_s, world.factors = (
        step_s,
        {"precision bf16-mixed": 0.5, "matmul_precision medium": 0.9},
    )
    find(world, PRECISION, MATMUL, OPTIMIZER, budget_s=budget_s)
    assert world.now < 1.5 * budget_s


def test_a_spent_budget_leaves_the_rest_out_and_says_so(world: World) -> None:
    world.step_s, world.factors = 1.0, {"precision bf16-mixed": 0.3, "fused_optimizer fused": 0.5}
    found = find(world, PRECISION, MATMUL, OPTIMIZER, budget_s=12.0)
    assert found.bars and "budget" in reason(found, "fused")


def test_an_endless_budget_ends(world: World) -> None:
    world.factors = {"precision bf16-mixed": 0.5}
    found = find(world, *ALL, budget_s=float("inf"))
    assert found.settings == Settings(precision="bf16-mixed") and world.now < 3600


def test_a_search_costs_no_more_than_its_share_of_the_run(world: World) -> None:
    world.factors = {"precision bf16-mixed": 0.5}
    find(world, PRECISION, MATMUL, OPTIMIZER, steps=5000, budget_share=0.1)  # 5 of 50 s
    assert world.now < 1.5 * 5
    world.now = 0.0
    with pytest.raises(Unpayable, match=r"100 steps of this run take 1.0 s.* 10 %"):
        find(world, PRECISION, steps=100, budget_share=0.1)
    assert world.now < 0.1


def test_a_run_that_ends_by_the_clock_is_as_long_as_that(world: World) -> None:
    world.factors = {"precision bf16-mixed": 0.5}
    find(world, PRECISION, MATMUL, OPTIMIZER, budget_share=0.1, longest_s=50.0)
    assert world.now < 1.5 * 5
    with pytest.raises(Unpayable, match="take 2.0 s"):
        find(world, PRECISION, budget_share=0.1, longest_s=2.0)


def test_other_work_is_answered_with_processor_time_and_said(world: World) -> None:
    """bf16 halves the work, and loses its core to another process whenever it runs."""
    world.factors = {"precision bf16-mixed": 0.5}
    spend, threads = world.spend, torch.get_num_threads()
    seen: list[int] = []

    def on_step(settings: Settings, count: int) -> None:
        seen.append(torch.get_num_threads())
        world.now += 4 * STEP_S if settings["precision"] == "bf16-mixed" else 0.0

    world.share, world.on_step = 0.5, on_step
    torch.set_num_threads(2)
    try:
        found = find(world, PRECISION)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert spend and seen[0] == 2 and seen[-1] == 1
    assert found.settings == Settings(precision="bf16-mixed")
    assert found.bars[-1].ratio == pytest.approx(2.0, rel=0.03)
    notes = [note for note in found.notes if "other work took the processor" in note]
    assert len(notes) == 1 and "one thread" in notes[0] and "processor time" in notes[0]


def test_a_passing_disturbance_is_waited_out(world: World) -> None:
    def on_step(settings: Settings, count: int) -> None:
        world.share = 0.5 if world.now < 0.5 else 1.0

    world.on_step, world.factors = on_step, {"precision bf16-mixed": 0.5}
    found = find(world, PRECISION)
    assert found.settings == Settings(precision="bf16-mixed") and not found.notes
    assert found.bars[-1].ratio == pytest.approx(2.0, rel=0.02)


def test_a_compile_is_charged_by_the_clock_that_is_right(world: World) -> None:
    """On a busy machine the wall says that compiled steps save nothing."""

    def on_step(settings: Settings, count: int) -> None:
        world.now += 9 * STEP_S if settings["compilation"] == "blocks" else 0.0

    world.share, world.on_step = 0.5, on_step
    world.factors = {"compilation blocks": 0.5, "compilation whole": 2.0}
    found = find(world, COMPILATION)
    trial = next(t for t in found.trials if t.value == "blocks")
    assert trial.verdict == "taken" and trial.pays_after_steps is not None


def test_threads_come_back_after_an_error(world: World) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        world.share = 0.5

        def failing(settings: Settings, count: int) -> None:
            if torch.get_num_threads() == 1:
                raise KeyboardInterrupt

        world.on_step = failing
        with pytest.raises(KeyboardInterrupt):
            find(world, PRECISION)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_nothing_to_try_is_an_answer(world: World) -> None:
    found = find(world)
    assert found.settings == Settings() and [bar.label for bar in found.bars] == ["plain"]
    assert found.resolution.ratio == pytest.approx(1.0, abs=0.02)
