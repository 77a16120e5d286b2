"""A report tells of the network that is left: weights and layers that change after the last validation, and formats between parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    AccelReport,
    AutocastPrecision,
    PostTrainingQuantization,
    StructuredPruning,
    UsePrecision,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore:Swapping scheduler",
    "ignore:.*are bit-equal|.*no faster.*",
)
CHANGED = "weights changed after the last validation"


class Net(tiny.Layers):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


class Writes(Callback):
    """As one that loads the best weights at the end does."""

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for p in pl_module.parameters():
            p.mul_(0.5)


def rows() -> DataLoader[Any]:
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8)


def reported(kwargs: dict[str, Any], folder: Path, *callbacks: Any, **more: Any) -> dict[str, Any]:
    """Fit beside a report, and return what stands in its file."""
    report = AccelReport(folder / "report.json", budget_s=0.01)
    torch.manual_seed(0)
    trainer = Trainer(**kwargs | {"max_epochs": 3, **more}, callbacks=[report, *callbacks])
    trainer.fit(Net(), rows(), rows())
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: [StochasticWeightAveraging(0.1, swa_epoch_start=1)], True),
        (lambda: [Writes()], True),
        (lambda: [EMAWeightAveraging(decay=0.9)], False),  # which validates its averages
        (list, False),
        (lambda: [StructuredPruning(ratio=0.5, when=1)], False),
    ],
)
def test_weights_that_no_validation_saw_are_told(
    trainer_kwargs: dict[str, Any], tmp_path: Path, make: Any, told: bool
) -> None:
    """Lightning #6074, #8654: stochastic averages are in the module when the fit is over, and no validation saw them."""
    notes = reported(trainer_kwargs, tmp_path, *make()).get("notes", [])
    assert sum(note.startswith(CHANGED) for note in notes) == told


def test_steps_after_the_last_validation_are_told_by_its_epoch_alone(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    found = reported(trainer_kwargs, tmp_path, check_val_every_n_epoch=2)
    assert not any(note.startswith(CHANGED) for note in found.get("notes", []))
    assert found["final_validated_after_epoch"] == {"val/loss": 2}


def test_layers_that_are_quantized_after_the_report_are_told(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    quantizes = PostTrainingQuantization(weights="int4", activations=None)
    (note,) = [
        n for n in reported(trainer_kwargs, tmp_path, quantizes)["notes"] if "after the fit" in n
    ]
    assert note.startswith("2 layers were quantized after the fit: all here is of the network")


class Game(LightningModule):
    """One network reads what the other made, in a short format under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.maker, self.judge = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        loss = self.judge(self.maker(batch[0])).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_network_that_reads_what_another_made_in_a_short_format_is_measured(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    report = AccelReport(tmp_path / "report.json", budget_s=0.01)
    callbacks = [UsePrecision(AutocastPrecision("bf16-mixed")), report]
    Trainer(**trainer_kwargs | {"max_epochs": 1}, callbacks=callbacks).fit(Game(), rows())
    found = json.loads((tmp_path / "report.json").read_text())
    assert not [n for n in found.get("notes", []) if "left out" in n]
    assert found["dense"]["macs"] == found["final"]["macs"] == 6 * 8 + 8 * 8 + 8


class Lazy(Net):
    """Its sizes are known after the first batch, which is one of validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))


def test_weights_that_have_no_numbers_yet_end_no_fit(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    report = AccelReport(tmp_path / "report.json", budget_s=0.01)
    sanity = {"num_sanity_val_steps": 1, "max_epochs": 1}
    Trainer(**trainer_kwargs | sanity, callbacks=[report, Writes()]).fit(Lazy(), rows(), rows())
    notes = json.loads((tmp_path / "report.json").read_text())["notes"]
    assert any(note.startswith(CHANGED) for note in notes)
