"""The base of our callbacks: an effect is there while a Trainer runs, and nothing of it afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_accel.bridge import ModelEdit
from lightning_accel.bridge.technique import Context, Situation, Skipped, Technique, place_of
from lightning_accel.errors import NoEffect
from lightning_accel.surgery import Change, Receipt, Stage
from lightning_accel.tuning import candidates, settings
from lightning_accel.tuning.settings import Settings


class Doubled(Technique):
    """Doubles the first weight while it is there: a toy of a technique that a tuner may choose."""

    needs = "weights"
    stage: ClassVar[Stage] = Stage.KIND
    name = "doubled"
    tunable: ClassVar = {"twice": {"factor": 2.0}, "thrice": {"factor": 3.0}}

    def __init__(self, factor: float = 2.0) -> None:
        self.factor = factor
        self.log_of_calls: list[str] = []

    @classmethod
    def candidates(cls, situation: Situation) -> Iterator[str | Skipped]:
        yield "twice"
        yield Skipped("thrice", f"too much for {situation.numerics}")

    @contextmanager
    def effect(self, context: Context) -> Iterator[Receipt]:
        weights = list(context.module.parameters())
        if not weights:
            raise NoEffect("there is nothing to double", "no weights", "add some")
        with torch.no_grad():
            weights[0].mul_(self.factor)
        self.log_of_calls.append("enter")
        try:
            yield Receipt((Change("first", "doubled"),))
        finally:
            with torch.no_grad():
                weights[0].div_(self.factor)
            self.log_of_calls.append("leave")


class Model(BoringModel):
    """Does not learn, and notes its first weight in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(next(self.parameters()).flatten()[0].item())
        return super().training_step(batch, batch_idx)

    validation_step = test_step = predict_step = training_step


def run(*callbacks: Callback, **given: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=2, limit_val_batches=1,
        limit_test_batches=1, limit_predict_batches=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **given,
    )  # fmt: skip


STAGES = ("fit", "validate", "test", "predict")


@pytest.mark.parametrize("stage", STAGES)
def test_the_effect_is_there_in_a_stage_and_not_after_it(stage: str) -> None:
    model, technique = Model(), Doubled()
    before = next(model.parameters()).detach().clone()
    getattr(run(technique), stage)(model)
    assert set(model.seen) == {float(2 * before.flatten()[0])}
    assert technique.log_of_calls == ["enter", "leave"]
    assert torch.equal(next(model.parameters()), before)
    assert technique.receipt.changes[0].name == "first"
    assert not technique._stacks


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_effect_is_left_alone(stage: str) -> None:
    class Rare(Doubled):
        acts_in = tuple(one for one in STAGES if one != stage)

    technique = Rare()
    getattr(run(technique), stage)(Model())
    assert technique.log_of_calls == []


@pytest.mark.parametrize("hook", ["setup", "on_fit_start", "on_train_start", "on_train_batch_end"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_an_exception_ends_is_taken_back(hook: str, error: type[BaseException]) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    model, technique, bad = Model(), Doubled(), Callback()
    before = next(model.parameters()).detach().clone()
    setattr(bad, hook, fail)
    with pytest.raises((error, SystemExit)):
        run(technique, bad).fit(model)
    assert torch.equal(next(model.parameters()), before)
    assert technique.log_of_calls == ["enter", "leave"] and not technique._stacks


def test_weights_that_are_made_late_are_changed_when_they_are_there() -> None:
    class Late(Model):
        def __init__(self) -> None:
            super().__init__()
            del self.layer

        def configure_model(self) -> None:
            if not hasattr(self, "layer"):
                self.layer = nn.Linear(32, 2)
                nn.init.ones_(self.layer.weight)

    model, technique = Late(), Doubled()
    run(technique).fit(model)
    assert model.seen == [2.0, 2.0, 2.0, 2.0]
    assert technique.log_of_calls == ["enter", "leave"]


def test_parts_that_are_made_late_are_changed_too() -> None:
    class Grows(Model):
        def configure_model(self) -> None:
            if not hasattr(self, "more"):
                self.more = nn.Linear(2, 2)

    technique = Doubled()
    run(technique).fit(Grows())
    assert technique.log_of_calls == ["enter", "leave", "enter", "leave"]


def test_another_edit_finds_the_plain_module_and_leaves_one_to_be_changed_anew() -> None:
    from lightning_accel.bridge.model_edit import tell

    found: list[float] = []

    class Edits(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            tell(trainer, "on_model_edit_start", pl_module)
            found.append(next(pl_module.parameters()).flatten()[0].item())
            tell(trainer, "on_model_edit_end", pl_module, Receipt())

    model, technique = Model(), Doubled()
    before = next(model.parameters()).flatten()[0].item()
    run(technique, Edits(), num_sanity_val_steps=0).fit(model)
    assert found == [before] and set(model.seen) == {2 * before}
    assert technique.log_of_calls == ["enter", "leave"] * 2


def test_an_edit_that_leaves_nothing_to_change_ends_the_effect_and_is_told() -> None:
    technique, trainer, model = Doubled(), run(), Model()
    technique.setup(trainer, model, "fit")
    technique.on_model_edit_start(trainer, model)
    model.layer = nn.Identity()
    with pytest.warns(UserWarning, match="Doubled ends here: there is nothing to double"):
        technique.on_model_edit_end(trainer, model, Receipt())
    technique.teardown(trainer, model, "fit")
    assert technique.log_of_calls == ["enter", "leave"]


def test_one_trainer_within_another_takes_back_its_own() -> None:
    model, technique = Model(), Doubled()
    before = next(model.parameters()).flatten()[0].item()

    class Within(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            other = Model()
            first = next(other.parameters()).flatten()[0].item()
            run(technique).test(other, verbose=False)
            assert other.seen == [2 * first]

    run(technique, Within()).fit(model)
    assert set(model.seen) == {2 * before}
    assert next(model.parameters()).flatten()[0].item() == before


def test_a_copy_has_entered_nothing() -> None:
    technique, copies = Doubled(), []

    class Copies(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            copies.extend([copy.deepcopy(technique), pickle.loads(pickle.dumps(technique))])  # noqa: S301

    model = Model()
    run(technique, Copies()).fit(model)
    for made in copies:
        assert made.factor == 2.0 and not made._stacks
        made.leave(model.trainer)
        assert made.log_of_calls == ["enter"]


def test_edits_change_places_before_the_first_is_set_up() -> None:
    class Last(Doubled):
        stage: ClassVar[Stage] = Stage.COMPILE

    class First(ModelEdit):
        stage: ClassVar[Stage] = Stage.SHAPE

    class Unordered(Technique):
        pass

    last, unordered, first = Last(), Unordered(), First()
    trainer = run(last, unordered, first)
    trainer.fit(Model())
    ours = [c for c in trainer.callbacks if isinstance(c, Technique)]  # type: ignore[attr-defined]
    assert ours == [first, unordered, last]
    assert [place_of(c) for c in ours] == [Stage.SHAPE, None, Stage.COMPILE]


def test_a_new_tunable_technique_touches_its_own_class_and_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(settings, "TRIED", (*settings.TRIED, Doubled))
    monkeypatch.setattr(candidates, "TRIED", settings.TRIED)
    monkeypatch.setitem(settings._APPLIED, Doubled.name, Doubled)
    trainer, model = run(), Model()
    contests, skipped = candidates.find(Situation(trainer, model, "amp"), ("doubled",))
    assert contests == [("doubled", ("twice",))]
    assert skipped == [("doubled", "thrice", "too much for amp")]
    chosen = Settings(doubled="twice")
    assert chosen.label == "doubled twice" and chosen.to_dict() == {"doubled": "twice"}
    assert chosen.nodes()["doubled"]["factor"] == 2.0
    with pytest.raises(ValueError, match="unknown `doubled`.*'twice', 'thrice'"):
        Settings(doubled="once")
    trainer.callbacks = [Doubled()]  # type: ignore[attr-defined]
    _, skipped = candidates.find(Situation(trainer, model, "amp"), ("doubled",))
    assert skipped == [("doubled", "any", "the Trainer already has Doubled")]
