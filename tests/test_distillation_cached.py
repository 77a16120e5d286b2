"""Fits with a cache of the teacher's answers: the teacher is spared, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from distilling import BOTH, Fit, Module, apart, data, fits, master, rows, teacher
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_accel import Distillation
from lightning_accel.distillation import SeededViews, Teacher, TeacherCache

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


class Counted(Teacher):
    """Counts the rows that it answers, outside of the network: what that holds is a part of it."""

    rows = 0

    def __call__(self, call: Any) -> Any:
        self.rows += len(call[0][0])
        return super().__call__(call)


def counting(network: nn.Module) -> Counted:
    return Counted(network, precision="32-true")


def exact(folder: Path, **kwargs: Any) -> TeacherCache:
    return TeacherCache(folder, dtype="float32", check_every_n_calls=None, **kwargs)


def test_a_fit_with_an_exact_cache_equals_one_without_and_asks_each_row_once(
    fit: Fit, tmp_path: Path
) -> None:
    plain, cached = Module(), Module()
    fit(plain, Distillation(teacher(), "kd"))
    counted = counting(master())
    distillation = Distillation(counted, "kd", cache=exact(tmp_path / "c"))
    trainer = fit(cached, distillation, max_epochs=2)
    assert apart(plain, cached) < 1e-6
    assert float(trainer.callback_metrics["distillation/hit_rate"]) == 1.0
    asked = counted.rows
    fit(Module(), Distillation(counted, "kd", cache=exact(tmp_path / "c")))
    # Another fit asks for the first look at all and for a try of the teacher, and for no lesson.
    assert asked == 24 + 2 * 8 and counted.rows == asked + 2 * 8


def test_features_are_cached_as_well(fit: Fit, tmp_path: Path) -> None:
    plain, cached = Module(), Module()
    fit(plain, Distillation(teacher(), BOTH))
    fit(cached, Distillation(teacher(), BOTH, cache=exact(tmp_path / "c")))
    assert apart(plain, cached) < 1e-6


def test_another_teacher_is_never_answered_for(fit: Fit, tmp_path: Path) -> None:
    other = master()
    with torch.no_grad():
        other.head.bias[0] = torch.nextafter(other.head.bias[0], torch.tensor(9.0))
    fit(Module(), Distillation(teacher(), "kd", cache=exact(tmp_path / "c")))
    counted = counting(other)
    fit(Module(), Distillation(counted, "kd", cache=exact(tmp_path / "c")))
    assert counted.rows == 24 + 2 * 8


class Bytes(LightningModule):
    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.net = tiny.TiedLM(width)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def text() -> DataLoader[Any]:
    tokens = torch.arange(96).view(16, 6) * 7 % 12
    return DataLoader(TensorDataset(tokens, (tokens + 7) % 12), 8)


def knows_text(fit: Fit) -> nn.Module:
    model = Bytes(16)
    fit(model, batches=text(), max_epochs=40)
    return model.net


def test_the_top_classes_and_a_tail_teach_a_language_model(fit: Fit, tmp_path: Path) -> None:
    """With all but one class kept, the tail is that class: the same fit as with all logits."""
    guide = knows_text(fit)
    whole, top, few = Bytes(8), Bytes(8), Bytes(8)
    losses = {"kd": {"weight": 1.0, "temperature": 2.0}}
    fit(whole, Distillation(teacher(guide), losses), batches=text())
    for model, k in ((top, 11), (few, 2)):
        cache = exact(tmp_path / str(k), top_k=k)
        fit(model, Distillation(teacher(guide), losses, cache=cache), batches=text())
    assert apart(whole, top) < 1e-5 < apart(whole, few)


def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_the_top_classes(
    fit: Fit, tmp_path: Path
) -> None:
    guide, student = knows_text(fit), Bytes(16)
    student.net.load_state_dict(guide.state_dict())
    callback = Distillation(
        teacher(guide),
        {"kd": {"weight": 1.0, "temperature": 3.0}},
        task_weight=0.0,
        cache=exact(tmp_path, top_k=2),
        diagnostics_every_n_steps=0,
    )
    fit(student, callback, batches=text())
    assert apart(student.net, guide) < 1e-5


def test_top_classes_at_several_temperatures_are_refused(fit: Fit, tmp_path: Path) -> None:
    cache = exact(tmp_path / "c", top_k=2)
    losses = {"kd": {"temperature": {"start": 4.0, "end": 1.0}}}
    with pytest.raises(RuntimeError, match="one constant temperature"):
        fit(Module(), Distillation(teacher(), losses, cache=cache))


class Noisy(Dataset[Any]):
    """An augmentation that never repeats itself."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        x, y = rows()[index]
        return x + 0.1 * torch.randn(x.shape), y


def test_a_useless_cache_says_so_and_stops_while_seeded_views_make_it_useful(
    fit: Fit, tmp_path: Path
) -> None:
    useless = Distillation(teacher(), "kd", cache=TeacherCache(tmp_path / "a"))
    with pytest.warns(UserWarning, match="switched itself off"):
        fit(Module(), useless, batches=DataLoader(Noisy(), 8), max_epochs=3)
    assert not useless.engine.cache.enabled  # type: ignore[union-attr]

    viewed = DataLoader(SeededViews(Noisy(), 2), 8)
    useful = Distillation(teacher(), "kd", cache=TeacherCache(tmp_path / "b"))
    trainer = fit(Module(), useful, batches=viewed, max_epochs=3)
    assert float(trainer.callback_metrics["distillation/hit_rate"]) == 1.0


def test_a_moving_teacher_is_not_cached(fit: Fit, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cannot be cached"):
        fit(Module(), Distillation("ema", "kd", cache=str(tmp_path)))


def test_the_same_rows_in_another_order_are_known(fit: Fit, tmp_path: Path) -> None:
    asked = []
    for batches in (data(), DataLoader(TensorDataset(*[t.flip(0) for t in rows().tensors]), 6)):
        counted = counting(master())
        cache = exact(tmp_path / "c")
        callback = Distillation(counted, "kd", cache=cache, diagnostics_every_n_steps=0)
        fit(Module(), callback, batches=batches)
        asked.append(counted.rows)
    assert asked == [24 + 2 * 8, 0 + 2 * 6]  # rows, and the first batch twice to try the teacher
