"""Lightning's searches for a learning rate and a batch size, which leave out all callbacks but their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import BOTH, Fit, Module, apart, fits, rows, teacher
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_accel import Distillation, DistillationModule, StructuredPruning
from lightning_accel.distillation import Teacher, losses
from lightning_accel.errors import AccelError

import tiny  # isort: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


class Rated(Module):
    """Has what the searches set, and sees what its steps get."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size, self.sizes = 0.05, 8, list[int]()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.sizes.append(len(batch[0]))
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader(rows(48), self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(rows(8), 8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class Loop(Rated):
    """The same lesson, written into the step by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.sizes.append(len(batch[0]))
        logits = self.net(batch[0])
        task = F.cross_entropy(logits, batch[1])
        with torch.no_grad():
            said = self.guide[0](batch[0])
        return 0.3 * task + 0.5 * losses.kd(logits, said, temperature=4.0)

    def with_guide(self) -> Loop:
        self.guide = [teacher().network.eval()]  # in a list: no part of the module
        return self


LESSON: dict[str, Any] = {"kd": {"weight": 0.5, "temperature": 4.0}}


def search(trainer_kwargs: dict[str, Any], model: Any, *callbacks: Any) -> Any:
    kwargs = {
        k: v for k, v in trainer_kwargs.items() if k not in ("limit_train_batches", "max_epochs")
    }
    trainer = Trainer(**{**kwargs, "callbacks": list(callbacks), "max_epochs": 2})
    found = Tuner(trainer).lr_find(model, num_training=12, early_stop_threshold=None)
    return trainer, found


def test_a_search_for_a_rate_sees_the_losses_of_the_loop_by_hand(
    trainer_kwargs: dict[str, Any],
) -> None:
    by_hand, ours = Loop().with_guide(), Rated()
    _, expected = search(trainer_kwargs, by_hand)
    trainer, found = search(trainer_kwargs, ours, Distillation(teacher(), LESSON, task_weight=0.3))
    assert found.results["loss"] == pytest.approx(expected.results["loss"], rel=1e-4)
    assert ours.lr == pytest.approx(by_hand.lr) and apart(ours.net, Module().net) == 0
    trainer.fit(ours)
    again = Trainer(**{**trainer_kwargs, "max_epochs": 2})
    again.fit(by_hand)
    assert apart(ours.net, by_hand.net) < 1e-5


@pytest.mark.parametrize("first", [True, False])
def test_projectors_begin_anew_after_a_search(fit: Fit, first: bool) -> None:
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
    lesson = Distillation(teacher(), BOTH)
    model = Rated()
    trainer = fit(model, *((finder, lesson) if first else (lesson, finder)), batches=data())
    (optimizer,) = trainer.optimizers
    assert len(optimizer.param_groups) == 2 and len(lesson.engine.heads)
    rate, plain = model.lr, Rated()
    plain.lr = rate
    other = Distillation(teacher(), BOTH)
    fit(plain, other, batches=data())
    assert apart(model.net, plain.net) == 0
    assert apart(lesson.engine.heads, other.engine.heads) == 0
    assert "training_step" not in vars(model)


def data() -> Any:
    return DataLoader(rows(), 8)


@pytest.mark.slow
def test_a_search_for_a_batch_size_runs_the_teacher(trainer_kwargs: dict[str, Any]) -> None:
    asked: list[int] = []

    class Counts(Teacher):
        def __call__(self, call: Any) -> Any:
            asked.append(len(call[0][0]))
            return super().__call__(call)

    kwargs = {k: v for k, v in trainer_kwargs.items() if k != "limit_train_batches"}
    guide = Counts(teacher().network, precision="32-true")
    models = []
    for lessons in ([], [Distillation(guide, BOTH)]):
        models.append(Rated())
        finder = BatchSizeFinder("power", steps_per_trial=2, init_val=2, max_trials=3)
        Trainer(**{**kwargs, "callbacks": [finder, *lessons]}).fit(models[-1])
    plain, ours = models
    assert ours.sizes == plain.sizes and ours.batch_size == plain.batch_size
    assert set(ours.sizes) == set(asked)


def test_a_module_that_learns_from_the_teacher_alone_finds_a_rate_for_that(
    trainer_kwargs: dict[str, Any],
) -> None:
    class Rates(DistillationModule):
        lr = 0.05

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.student.parameters(), self.lr)

    torch.manual_seed(0)
    model = Rates(tiny.ConvNet(), teacher(), LESSON, task_loss=None)
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 2})
    found = Tuner(trainer).lr_find(model, data(), num_training=6, early_stop_threshold=None)
    assert found is not None and min(found.results["loss"]) > 0.01


@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before the first step")
def test_a_module_that_learns_from_the_teacher_alone_can_be_looked_at_before(fit: Fit) -> None:
    model = DistillationModule(tiny.ConvNet(), teacher(), task_loss=None, optimizer=torch.optim.SGD)
    fit(model, StructuredPruning(ratio=0.5, when=0), batches=data())  # which runs a step of a copy
    assert model.student.head.weight.shape[1] == 8  # type: ignore[union-attr, index]


def test_a_step_that_nothing_teaches_is_an_error() -> None:
    model = DistillationModule(tiny.ConvNet(), teacher(), task_loss=None)
    with pytest.raises(AccelError, match="nothing to learn from.*Do: call `trainer.fit`"):
        model.training_step(next(iter(data())), 0)


@pytest.mark.slow
def test_a_search_beside_a_prune_is_one_without_a_teacher_as_the_fit_begins_so(fit: Fit) -> None:
    finder = LearningRateFinder(num_training_steps=4, early_stop_threshold=None)
    model = Rated()
    prune = StructuredPruning(ratio=0.5, when=1)
    fit(model, finder, prune, Distillation("self", "kd", student="net"), batches=data())
    assert len(model.sizes) == 4 + 2 * 3 and finder.optimal_lr is not None


def test_a_search_beside_an_average_that_teaches_leaves_the_fit_as_it_is(fit: Fit) -> None:
    finder = LearningRateFinder(num_training_steps=4, update_attr=False)
    models = []
    for finders in ([finder], []):
        models.append(Rated())
        fit(models[-1], *finders, Distillation("ema", "kd", ema_decay=0.5), batches=data())
    assert apart(*models) == 0 and len(models[0].sizes) == len(models[1].sizes) + 4
