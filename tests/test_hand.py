"""Techniques that need a batch, on data that can be read only once: the fit's own batch, and no batch less."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from odd import LOADERS, Manual, Plain, WritesIntoTheBatch, X, Y
from plain import Rows, assert_same
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel import AccelReport, AutoTune, StructuredPruning
from lightning_accel.bridge.data import ReadOnce
from lightning_accel.bridge.hand import Hand
from lightning_accel.memory import ActivationBudget
from lightning_accel.pruning import SparsityTraining
from lightning_accel.surgery.rng import random_state

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Your `IterableDataset` has `__len__` defined"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:AutoTune leaves this fit as it is"),
]

ONCE = ("consumes", "one shot", "one shot in a closure", "foreign", "persistent")


def again_and_again() -> DataLoader[Any]:
    """The batches of "one shot" from where anybody may read them."""
    return DataLoader([(X[i % 40], Y[i % 40]) for i in range(400)], 8)  # type: ignore[arg-type]


class GoesOn(IterableDataset[Any]):
    """The items of "one shot" by a stream that can be copied, and goes on where its last pass ended."""

    def __init__(self, end: int = 400) -> None:
        self.at, self.end = 0, end

    def __iter__(self) -> Iterator[Any]:
        while self.at < self.end:
            self.at += 1
            yield X[(self.at - 1) % 40], Y[(self.at - 1) % 40]


def fit(
    kwargs: dict[str, Any], kind: type[Plain], data: Any, callbacks: list[Callback], folder: Path
) -> dict[str, Any]:
    """Return what a fit leaves behind."""
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(0)
    module, rows = kind(), Rows()
    given = {"max_epochs": 6, "max_steps": 10, "logger": rows, "log_every_n_steps": 1}
    given |= {"callbacks": callbacks, "default_root_dir": folder, "limit_train_batches": 5}
    trainer = Trainer(**{**kwargs, **given})
    trainer.fit(module, data)
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizer": [o.state_dict() for o in trainer.optimizers],
        "random": random_state(),
        "calls": module.calls,
        "rows": rows.rows,
        "experiment": rows.experiment,
    }


class Compiled(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")  # type: ignore[assignment]


class CompiledManual(Manual):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="aot_eager")  # type: ignore[assignment]


def sparsity() -> SparsityTraining:
    return SparsityTraining("growing", strength=0.1, every_n_steps=2)


TECHNIQUES: dict[str, Callable[[], Callback]] = {
    "sparsity": sparsity,
    "budget": lambda: ActivationBudget(0.5),
    "report": lambda: AccelReport(budget_s=0.01),
    "tuner": lambda: AutoTune(cache=False, budget_s=0.01),
}


def given(calls: list[Any]) -> list[Any]:
    """Return what each step was given."""
    return [call[:4] for call in calls if isinstance(call, tuple) and call[0] == "step"]


PLAIN: dict[Any, dict[str, Any]] = {}
CASES = [(loader, Plain) for loader in ONCE]
CASES += [("one shot in a closure", Manual), ("foreign", Manual)]


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize(("loader", "kind"), CASES)
def test_a_fit_is_given_every_batch_of_a_stream(
    trainer_kwargs: dict[str, Any], tmp_path: Path, loader: str, kind: type[Plain], technique: str
) -> None:
    if technique == "budget":
        kind = {Plain: Compiled, Manual: CompiledManual}[kind]

    def run(callbacks: list[Callback]) -> dict[str, Any]:
        folder = tmp_path / str(len(callbacks))
        return fit(trainer_kwargs, kind, LOADERS[loader](), callbacks, folder)

    plain = PLAIN.setdefault((loader, kind), {}) or run([])
    PLAIN[loader, kind] = plain
    torch._dynamo.reset()
    found = run([TECHNIQUES[technique]()])
    assert given(found["calls"]) == given(plain["calls"]) and given(plain["calls"])
    if technique != "sparsity":  # which acts from the first step
        assert_same(found, plain)


@pytest.mark.parametrize("loader", ["one shot", "one shot in a closure"])
def test_a_budget_acts_on_a_stream_as_on_other_data(
    trainer_kwargs: dict[str, Any], tmp_path: Path, loader: str
) -> None:
    known, budget = ActivationBudget(0.5), ActivationBudget(0.5)
    fit(trainer_kwargs, Compiled, again_and_again(), [known], tmp_path / "known")
    torch._dynamo.reset()
    fit(trainer_kwargs, Compiled, LOADERS[loader](), [budget], tmp_path / "once")
    assert known.savings is not None and budget.savings is not None
    assert budget.savings == known.savings
    assert budget.savings.ratio is not None and budget.savings.ratio < 1


@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.parametrize("first", ["sparsity", "prune"])
def test_sparsity_and_a_prune_learn_from_a_stream_what_they_learn_from_other_data(
    trainer_kwargs: dict[str, Any], tmp_path: Path, first: str, manual: bool
) -> None:
    def run(data: Any, name: str) -> dict[str, Any]:
        prune = StructuredPruning(ratio=0.5, when=1, recalibrate=0, compensate=False)
        callbacks = [sparsity(), prune] if first == "sparsity" else [prune, sparsity()]
        return fit(trainer_kwargs, Manual if manual else Plain, data, callbacks, tmp_path / name)

    once, known = run(LOADERS["one shot"](), "once"), run(DataLoader(GoesOn(), 8), "known")
    assert_same(once["weights"], known["weights"])
    assert once["weights"]["net.0.weight"].shape == (6, 6), "it was cut"


@pytest.mark.parametrize(
    ("loader", "kind"), [*CASES, ("one shot", WritesIntoTheBatch), ("goes on", Plain)]
)
def test_a_report_measures_what_it_was_fitted_on(
    trainer_kwargs: dict[str, Any], tmp_path: Path, loader: str, kind: type[Plain]
) -> None:
    report = AccelReport(budget_s=0.01)
    data = DataLoader(GoesOn(80), 8) if loader == "goes on" else LOADERS[loader]()
    fit(trainer_kwargs, kind, data, [report], tmp_path / "once")
    assert report.report is not None
    assert report.report.final.macs == report.report.dense.macs == 6 * 12 + 12 * 3
    assert report.report.dense.params == sum(p.numel() for p in kind().parameters())
    assert not any("failed" in note for note in report.report.extra.get("notes", ()))
    assert report._at_hand is None, "a finished fit holds no batch"


@pytest.mark.parametrize("once", [False, True])
def test_a_report_keeps_a_batch_only_of_a_stream_and_as_the_step_was_given_it(
    trainer_kwargs: dict[str, Any], tmp_path: Path, once: bool
) -> None:
    held: list[Any] = []

    class Looks(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            held.append(report._at_hand and report._at_hand.batch[0])

    report = AccelReport(budget_s=0.01)
    data = LOADERS["one shot"]() if once else again_and_again()
    fit(trainer_kwargs, WritesIntoTheBatch, data, [report, Looks()], tmp_path)
    if once:
        assert torch.equal(held[0], X[:8]) and held[1] is held[0]
    else:
        assert held and not any(held)


class Uncopied(list[Any]):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("there is one of me")


@pytest.mark.filterwarnings("ignore:no batch of the stream could be kept")
@pytest.mark.filterwarnings("ignore:measuring the dense model against")
def test_a_batch_that_cannot_be_copied_costs_the_report_and_not_the_fit(
    trainer_kwargs: dict[str, Any],
) -> None:
    class Odd(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([*batch], batch_idx)

    held = (Uncopied([X[:8], Y[:8]]) for _ in range(3))
    report, module = AccelReport(budget_s=0.01), Odd()
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 1, "callbacks": [report]})
    trainer.fit(module, Taken(held))
    assert len(given(module.calls)) == 3 and report.report is not None
    assert any("read only once" in note for note in report.report.extra["notes"])


class Taken:
    def __init__(self, held: Iterator[Any]) -> None:
        self.held = held

    def __iter__(self) -> Iterator[Any]:
        return self.held


def test_work_waits_for_a_batch_only_where_it_must() -> None:
    hand, seen = Hand(), []

    def needs(at_hand: Any) -> None:
        if at_hand is None:
            raise ReadOnce("a stream")
        seen.append(at_hand.batch)

    for _ in range(2):
        hand.do(needs)
    assert not seen
    hand.take("one")
    assert seen == ["one", "one"], "both, with the next batch"
    hand.do(needs)
    assert len(seen) == 3, "the batch is still at hand"
    hand.drop()
    hand.do(needs)
    hand.clear()
    hand.take("two")
    assert len(seen) == 3, "the fit that it waited for is over"

    def refuses(at_hand: Any) -> None:
        raise ReadOnce("whatever is at hand")

    with pytest.raises(ReadOnce):
        hand.do(refuses)
