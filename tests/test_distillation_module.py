"""A student and a teacher without a LightningModule: fit, evaluate, save, resume, export."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from distilling import (
    BOTH,
    Fit,
    apart,
    by_hand,
    data,
    epochs,
    fits,
    master,
    rows,
    teacher,
)
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.data import DataLoader
from torchmetrics import Accuracy

from lightning_accel import (
    DistillationModule,
    StructuredPruning,
)
from lightning_accel.distillation import losses
from lightning_accel.errors import AccelError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]


@pytest.fixture
def fit(trainer_kwargs: dict[str, Any]) -> Fit:
    return fits(trainer_kwargs)


def optimizer(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def halved(given: Any) -> Any:
    return schedules.StepLR(given, 1, 0.5)


def student(net: Any = tiny.ConvNet) -> nn.Module:
    torch.manual_seed(0)
    return net()


def made(losses: Any = None, **kwargs: Any) -> DistillationModule:
    given = {"optimizer": optimizer, "teacher": teacher(), **kwargs}
    return DistillationModule(student(), losses=losses or BOTH, **given)


def test_it_learns_what_the_callback_teaches(fit: Fit) -> None:
    module = made({"fitnet": {"layers": "conv", "weight": 0.5}}, task_weight=0.3)
    fit(module)
    assert apart(module.student, by_hand("fitnet")[0]) < 1e-6


def test_the_student_alone_is_in_the_state_dict_and_in_the_checkpoint(
    fit: Fit, tmp_path: Path
) -> None:
    module = made()
    fit(module, epochs(tmp_path))
    stored = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert set(stored) == {f"student.{name}" for name in tiny.ConvNet().state_dict()}
    plain = tiny.ConvNet()
    plain.load_state_dict(module.student.state_dict())
    loaded = DistillationModule.load_from_checkpoint(tmp_path / "epoch=1.ckpt", student=student())
    assert apart(loaded.student, plain) == 0


def test_resume_is_bit_equal(fit: Fit, tmp_path: Path) -> None:
    whole, resumed = made(scheduler=halved), made(scheduler=halved)
    fit(whole, epochs(tmp_path), max_epochs=3)
    fit(resumed, max_epochs=3, ckpt=tmp_path / "epoch=0.ckpt")
    assert apart(whole, resumed) == 0


def test_it_validates_tests_and_predicts_without_a_teacher(
    fit: Fit, tmp_path: Path, trainer_kwargs: dict[str, Any]
) -> None:
    accuracy = Accuracy("multiclass", num_classes=4)
    module = made(metrics=accuracy)
    trainer = fit(module, epochs(tmp_path), max_epochs=4)
    expected = trainer.validate(module, data(), verbose=False)[0]
    alone = DistillationModule(student(), metrics=accuracy)
    fresh = Trainer(**trainer_kwargs)
    path = tmp_path / "epoch=3.ckpt"
    assert fresh.validate(alone, data(), ckpt_path=path, verbose=False)[0] == expected
    tested = fresh.test(alone, data(), ckpt_path=path, verbose=False)[0]
    assert tested["test/loss"] == expected["val/loss"]
    predicted = torch.cat(fresh.predict(alone, data(), ckpt_path=path))  # type: ignore[arg-type]
    labels = torch.cat([y for _, y in data()])
    right = float((predicted.argmax(1) == labels).float().mean())
    assert abs(right - expected["val/MulticlassAccuracy"]) < 1e-6
    with pytest.raises(AccelError, match="no teacher"):
        fresh.fit(alone, data())


def test_it_learns_from_the_teacher_alone(fit: Fit) -> None:
    module, guide, net = made({"kd": 1.0}, task_loss=None), master(), student()
    fit(module)
    sgd = optimizer(net.parameters())
    for x, _ in [*data(), *data()]:
        sgd.zero_grad()
        losses.kd(net(x), guide(x).detach()).backward()
        sgd.step()
    assert apart(module.student, net) < 1e-6


@pytest.mark.slow
def test_it_prunes_itself_with_the_unpruned_network_as_teacher(fit: Fit) -> None:
    module = made(teacher=teacher("self"))
    fit(module, StructuredPruning(ratio=0.5, when=1))
    assert module.student.conv[0].out_channels == 4  # type: ignore[index, union-attr]


def test_it_serves_several_fits_and_copies(fit: Fit) -> None:
    module = made()
    trainer = fit(module)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, data())
    fit(module)
    assert apart(copy.deepcopy(module), module) == 0
    other = pickle.loads(pickle.dumps(module))  # noqa: S301
    fit(other)
    assert apart(other, module) > 0


def test_a_copy_learns_on_its_own(fit: Fit) -> None:
    one = made()
    two = copy.deepcopy(one)
    fit(one)
    fit(two)
    assert apart(one, two) == 0
    assert one.distillation is not None


def test_a_batch_may_be_a_mapping_of_keywords(fit: Fit) -> None:
    class Answers(nn.Module):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            logits = self.net(x)
            return Answer(F.cross_entropy(logits, labels), logits)

    rows_of = [{"x": x, "labels": y} for x, y in rows()]
    module = DistillationModule(
        Answers(student()), teacher(Answers(master())), {"kd": {"weight": 0.5}},
        optimizer=optimizer, task_weight=0.3,
    )  # fmt: skip
    fit(module, batches=DataLoader(rows_of, 8))
    assert apart(module.student.net, by_hand("kd")[0]) < 1e-6  # type: ignore[arg-type]


@dataclass
class Answer:
    loss: Tensor
    logits: Tensor


@pytest.mark.parametrize(
    ("kwargs", "kind"),
    [
        ({"student": 5}, TypeError),
        ({"interval": "day"}, ValueError),
        ({"task_loss": "mse"}, ValueError),
        ({"teacher": nn.Linear(1, 1), "losses": "nope"}, ValueError),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    kwargs: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="Found"):
        DistillationModule(**{"student": nn.Linear(1, 1), **kwargs})
