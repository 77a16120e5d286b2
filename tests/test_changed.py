"""A fit that is resumed with other settings: they hold, or it is said at the start that they do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import Distillation, Macs, Params, SparsityTraining, WeightMasks
from lightning_accel import StructuredPruning as Pruning
from lightning_accel.errors import AccelError
from lightning_accel.pruning.history import left

ASKED = "asked for something else than in the fit that the checkpoint comes from"


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data() -> DataLoader[Any]:
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(8, 4, generator=numbers)
    return DataLoader(TensorDataset(x, torch.arange(8) % 3), 4)


Fits = Callable[..., list[str]]


@pytest.fixture
def fits(trainer_kwargs: dict[str, Any], tmp_path: Path) -> Fits:
    """Fit with one callback, resume with another, and return what was warned on the way."""

    def go(before: Callback, now: Callback) -> list[str]:
        torch.manual_seed(0)
        kwargs = {**trainer_kwargs, "max_epochs": 2}
        first = Trainer(**kwargs, max_steps=2, callbacks=[before])  # ends after one epoch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first.fit(Net(), data())
        first.save_checkpoint(tmp_path / "a.ckpt")
        torch.load(tmp_path / "a.ckpt", weights_only=True)
        second = Trainer(**kwargs, callbacks=[now])
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            second.fit(Net(), data(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        return [str(w.message) for w in heard if ASKED in str(w.message)]

    return go


IN_VAIN: dict[str, tuple[Callable[[], Callback], Callable[[], Callback], str]] = {
    "ratio": (
        lambda: Pruning(ratio=0.5, when=0),
        lambda: Pruning(ratio=0.75, when=0),
        "ratio=0.5 in the checkpoint, 0.75 now; every step is done or taken back",
    ),
    "target": (
        lambda: Pruning(target=Macs(0.5), when=0),
        lambda: Pruning(ratio=0.75, when=0),
        "target=Macs(share=0.5) in the checkpoint, None now; every step is done or taken back",
    ),
    "when": (
        lambda: Pruning(ratio=0.5, when=0),
        lambda: Pruning(ratio=0.5, when=1),
        "when=(0,) in the checkpoint, (1,) now; every step is done or taken back",
    ),
    "amount": (
        lambda: WeightMasks(0.5),
        lambda: WeightMasks(0.75),
        "amount=0.5 in the checkpoint, 0.75 now; the masks of the checkpoint stay",
    ),
    "pattern": (
        lambda: WeightMasks(0.5),
        lambda: WeightMasks(pattern="2:4"),
        "pattern=None in the checkpoint, '2:4' now; the masks",
    ),
    "picked": (
        lambda: SparsityTraining("growing", ratio=0.5),
        lambda: SparsityTraining("growing", ratio=0.25),
        "ratio=0.5 in the checkpoint, 0.25 now; the units that were picked stay",
    ),
}


@pytest.mark.parametrize("name", IN_VAIN)
def test_a_setting_that_comes_too_late_is_told_once(fits: Fits, name: str) -> None:
    before, now, said = IN_VAIN[name]
    (heard,) = fits(before(), now())
    assert said in heard and "Do: give the former values" in heard


@pytest.mark.parametrize("name", IN_VAIN)
def test_the_same_settings_are_not_worth_a_word(fits: Fits, name: str) -> None:
    before, _, _ = IN_VAIN[name]
    assert fits(before(), before()) == []


@pytest.mark.slow
def test_steps_to_come_are_done_as_is_asked_now(fits: Fits) -> None:
    again = Pruning(ratio=0.75, when=[0, 1])
    assert fits(Pruning(ratio=0.5, when=[0, 1]), again) == []
    straight = Pruning(ratio=0.75, when=[0, 1])
    fits(Pruning(ratio=0.75, when=[0, 1]), straight)
    assert again.history[-1]["params_after"] == straight.history[-1]["params_after"]


def test_masks_that_are_still_to_come_are_those_asked_now(fits: Fits) -> None:
    masks = WeightMasks(0.75, when=1)
    assert fits(WeightMasks(0.5, when=1), masks) == []
    kept = torch.cat([keep.flatten() for keep in masks.masks.values()])
    assert 1 - float(kept.float().mean()) == pytest.approx(0.75, abs=0.02)


@pytest.mark.parametrize("now", [Params(0.5), Macs(0.3)], ids=["another unit", "another share"])
def test_a_schedule_goes_on_in_its_own_unit(fits: Fits, now: Any) -> None:
    """Shares of arithmetic that are gone say nothing about shares of parameters."""
    before, again = Pruning(target=Macs(0.5), when=[0, 1]), Pruning(target=now, when=[0, 1])
    if isinstance(now, Macs):
        assert fits(before, again) == []
        assert left(again.history) == pytest.approx(0.3, abs=0.06)
    else:
        with pytest.raises(AccelError, match=r"in the unit in which it began.*target=Macs.*Params"):
            fits(before, again)


def hints(layers: str) -> Distillation:
    torch.manual_seed(1)
    wide = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.Linear(24, 3))
    return Distillation(wide, {"fitnet": {"layers": layers}}, student="net")


def test_a_projector_is_not_taken_for_other_layers(fits: Fits) -> None:
    assert fits(hints("0: 0"), hints("0: 0")) == []
    with pytest.raises(AccelError, match="projectors of the checkpoint belong to other layers"):
        fits(hints("0: 0"), hints("2: 2"))


class Sixteen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.repeat(1, 16 // x.shape[1])


def test_the_student_that_is_named_now_is_taught(fits: Fits) -> None:
    before, now = (Distillation(Sixteen(), "mse", student=name) for name in ("net.0", "net.2"))
    fits(before, now)
    assert before._course is not None and before._course.student == "net.0"
    assert now._course is not None and now._course.student == "net.2"
