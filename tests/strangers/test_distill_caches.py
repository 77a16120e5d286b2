"""Programs that people reported elsewhere: stored answers of teachers, and searches that run before a training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distilling import BOTH, Fit, Module, apart, fits, master, rows, teacher
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_accel import Distillation
from lightning_accel.distillation import SeededViews, TeacherCache

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


class Augmented(Dataset):
    """Flips and crops at random, as everybody does."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = rows()[index]
        x = x.flip(-1) if torch.rand(()) < 0.5 else x
        return x.roll(int(torch.randint(3, ())), -1), y


def shuffled(data: Any) -> DataLoader[Any]:
    return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(5))


def lesson(cache: Any, losses: Any = "kd") -> Distillation:
    return Distillation(
        teacher(), {"kd": {"weight": 0.5}} if losses == "kd" else losses, cache=cache
    )


@pytest.mark.parametrize("data", [rows, Augmented], ids=["shuffled", "augmented"])
def test_answers_belong_to_what_the_teacher_saw_and_not_to_a_place(
    fit: Fit, tmp_path: Any, data: Callable[[], Any]
) -> None:
    """haitongli/knowledge-distillation-pytorch#4, #9, #16, #23: answers by number of batch, loaders that shuffle."""
    students = []
    for cache in (None, TeacherCache(tmp_path / "c", dtype="float32", min_hit_rate=0)):
        torch.manual_seed(3)
        students.append(Module())
        fit(students[-1], lesson(cache), batches=shuffled(data()), max_epochs=3)
    assert apart(*students) < 1e-6


def test_a_resumed_fit_sees_the_views_of_the_uninterrupted_one(fit: Fit, tmp_path: Any) -> None:
    """microsoft/Cream#109 (TinyViT): seeds of stored views count from the epoch that a run begins with."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    seen: list[list[float]] = []
    for resumes in (False, True):
        model, sums = Module(), list[float]()
        model.on_train_batch_start = lambda b, i, sums=sums: sums.append(float(b[0].sum()))  # type: ignore[method-assign]

        def data() -> Any:
            return DataLoader(SeededViews(Augmented(), 3), 8)

        if not resumes:
            saver = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
            fit(model, lesson(None), saver, batches=data(), max_epochs=3)
        else:
            path = tmp_path / "epoch=0.ckpt"
            fit(model, lesson(None), batches=data(), max_epochs=3, ckpt=path)
        seen.append(sums)
    assert len(seen[0]) == 9 and seen[1] == seen[0][3:]


class Rated(Module):
    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size, self.steps = 0.05, 8, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader(rows(48), self.batch_size)

    def val_dataloader(self) -> Any:
        return DataLoader(rows(8), 8)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


class AtMilestones(LearningRateFinder):
    """As the documentation of the callback shows it; the rate is looked at, and not taken."""

    def __init__(self, *milestones: int) -> None:
        super().__init__(num_training_steps=4, early_stop_threshold=None, update_attr=False)
        self.milestones = milestones

    def on_fit_start(self, *args: Any, **kwargs: Any) -> None:
        return

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch in self.milestones:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("losses", ["kd", BOTH], ids=["logits", "projectors"])
@pytest.mark.parametrize("milestones", [(0,), (1,), (0, 1)])
def test_a_search_in_mid_training_leaves_the_training_as_it_was(
    fit: Fit, milestones: tuple[int, ...], losses: Any
) -> None:
    """Lightning#21903, #4846: searches that begin at the start of an epoch, after steps have been taken."""
    models, heads = [], []
    for finders in ([AtMilestones(*milestones)], []):
        models.append(Rated())
        ours = lesson(None, losses)
        fit(models[-1], *finders, ours, batches=DataLoader(rows(), 8))
        heads.append(ours.engine.heads)
    plain = Rated()
    fit(plain, AtMilestones(*milestones), batches=DataLoader(rows(), 8))
    assert (
        models[0].steps == plain.steps
    )  # Lightning itself takes none where steps were taken before
    assert apart(*models) == 0 and (losses == "kd" or apart(*heads) == 0)


def test_a_step_that_returns_nothing_may_be_searched(fit: Fit) -> None:
    """Lightning#17992: steps that skip their batch during a search for a rate."""

    class Skips(Rated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if self.steps % 3 == 1 else loss

    model = Skips()
    finder = LearningRateFinder(num_training_steps=6, early_stop_threshold=None)
    fit(model, finder, lesson(None, BOTH), batches=DataLoader(rows(48), 8))
    assert model.steps == 6 + 2 * 6


@pytest.mark.slow
def test_both_searches_and_a_cache_end_with_the_fit_that_follows_alone(
    fit: Fit, tmp_path: Any, trainer_kwargs: dict[str, Any]
) -> None:
    """Lightning#3088: a batch size and a rate, one after the other."""
    from lightning.pytorch import Trainer

    found: list[Any] = []
    kwargs = {k: v for k, v in trainer_kwargs.items() if k != "limit_train_batches"}
    for lessons in ([], [lesson(tmp_path / "c", BOTH)]):
        model = Rated()
        finders: list[Callback] = [
            BatchSizeFinder("power", steps_per_trial=2, init_val=2, max_trials=2),
            LearningRateFinder(num_training_steps=6, early_stop_threshold=None),
        ]
        Trainer(**{**kwargs, "callbacks": [*finders, *lessons]}).fit(model)
        found.append((model.steps, model.batch_size))
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_teacher_with_another_temperature_inside_is_another_teacher(
    fit: Fit, tmp_path: Any
) -> None:
    """stevezheng23/mrc_tf#151, torchdistill#539: stored answers found by a name that did not change."""

    class Sharpened(nn.Module):
        def __init__(self, options: dict[str, Any]) -> None:
            super().__init__()
            self.net, self.options = master(), options

        def forward(self, x: Tensor) -> Tensor:
            return self.options["act"](self.net(x) / self.options["temperature"])

    students = []
    for options in (
        {"temperature": 1.0, "act": F.relu},
        {"temperature": 3.0, "act": F.relu},
        {"temperature": 3.0, "act": lambda x: F.relu(x) + 1},
    ):
        for cache in (
            None,
            TeacherCache(tmp_path / "one place", dtype="float32", check_every_n_calls=None),
        ):
            students.append(Module())
            guide = teacher(Sharpened(options))
            fit(students[-1], Distillation(guide, "kd", cache=cache), batches=DataLoader(rows(), 8))
    assert all(apart(students[i], students[i + 1]) < 1e-6 for i in (0, 2, 4))
    assert apart(students[0], students[2]) > 1e-4
