"""Networks and fits that a prune once refused without reason."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import StructuredPruning
from lightning_accel.errors import NoEffect, Unsupported
from lightning_accel.loop import FusedOptimizer, LeanLoop
from lightning_accel.pruning import SparsityTraining, prune

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


class Spectral(nn.Module):
    """A layer of a Fourier neural operator (Li et al. 2020, arXiv 2010.08895): its weights are complex."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Conv1d(3, 16, 1), nn.Conv1d(16, 2, 1)
        self.weight = nn.Parameter(torch.randn(16, 16, 4, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(self.lift(x))
        out = torch.zeros_like(modes)
        out[..., :4] = torch.einsum("bik,iok->bok", modes[..., :4], self.weight)
        return self.head(F.relu(torch.fft.irfft(out, n=x.shape[-1])))


def kept(small: Tensor, dense: Tensor) -> list[int]:
    """Return which rows of `dense` are the rows of `small`, by value."""
    return [next(i for i, row in enumerate(dense) if torch.equal(row, one)) for one in small]


def test_a_network_with_complex_weights_equals_its_masked_twin() -> None:
    dense = Spectral()
    small = copy.deepcopy(dense)
    prune(small, example=torch.randn(2, 3, 16), ratio=0.5)
    assert small.weight.shape == (8, 8, 4) and small.weight.dtype == torch.cfloat
    inner = kept(small.lift.weight, dense.lift.weight)
    outer = kept(small.head.weight.transpose(0, 1), dense.head.weight.transpose(0, 1))
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        keep = torch.zeros(16, 16, 1)
        keep[torch.tensor(inner)[:, None], torch.tensor(outer)] = 1
        masked.weight.mul_(keep)
    x = torch.randn(5, 3, 24)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-4)


class Thaws(LightningModule):
    """Its first layer learns from epoch 1 on."""

    def __init__(self, thaw: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.net[0].requires_grad_(False)
        self.thaw = thaw

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == self.thaw:
            self.net[0].requires_grad_(True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(kwargs: dict[str, Any], module: Thaws, when: int) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 3), 8)
    callbacks: list[Callback] = [StructuredPruning(ratio=0.5, when=when)]
    Trainer(**{**kwargs, "max_epochs": 4, "callbacks": callbacks}).fit(module, data)


def test_what_is_frozen_at_the_start_can_be_pruned_once_it_is_not(
    trainer_kwargs: dict[str, Any],
) -> None:
    module = Thaws(thaw=1)
    fit(trainer_kwargs, module, when=2)
    assert module.net[0].out_features == 8 and module.net[0].weight.requires_grad  # type: ignore[union-attr]


class Thawing(Callback):
    """Unfreezes at the start of an epoch, as `BackboneFinetuning` does."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.requires_grad_(True)


class ThawsAtOnce(Thaws):
    def on_train_start(self) -> None:
        self.net[0].requires_grad_(True)


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("who", ["module", "module at once", "callback after", "callback before"])
@pytest.mark.filterwarnings("ignore:StructuredPruning")  # of an untrained network
def test_what_is_unfrozen_in_the_epoch_of_the_prune_goes_too(
    trainer_kwargs: dict[str, Any], epoch: int, who: str
) -> None:
    module = ThawsAtOnce(epoch) if who == "module at once" else Thaws(epoch)
    callbacks: list[Callback] = [StructuredPruning(ratio=0.5, when=epoch)]
    if who.startswith("callback"):
        module.thaw = 99
        callbacks.insert(len(callbacks) * (who == "callback after"), Thawing(epoch))
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 3), 8)
    Trainer(**{**trainer_kwargs, "max_epochs": 4, "callbacks": callbacks}).fit(module, data)
    assert module.net[0].out_features == 8 == module.net[2].in_features  # type: ignore[union-attr]


def test_what_is_frozen_when_a_prune_is_due_stays_whole(trainer_kwargs: dict[str, Any]) -> None:
    module = Thaws(thaw=3)
    with pytest.raises(NoEffect, match="frozen"):
        fit(trainer_kwargs, module, when=2)
    assert module.net[0].out_features == 16


class PastLightning(LightningModule):
    """Steps the optimizer inside of Lightning's."""

    def __init__(self, past: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.past = past
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(batch[0]), batch[1]))
        (optimizer.optimizer if self.past else optimizer).step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("past", [False, True])
def test_a_penalty_that_cannot_reach_the_step_is_refused(
    trainer_kwargs: dict[str, Any], past: bool
) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 3), 8)
    given = {**trainer_kwargs, "max_epochs": 1, "callbacks": [SparsityTraining("slimming")]}
    trainer = Trainer(**given)
    if past:
        with pytest.raises(Unsupported, match="past Lightning"):
            trainer.fit(PastLightning(past), data)
    else:
        trainer.fit(PastLightning(past), data)
        assert trainer.global_step == 2


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (lambda: SparsityTraining("slimming"), "SparsityTraining: slimming on 1 groups"),
        (lambda: FusedOptimizer("foreach"), "FusedOptimizer('foreach'): "),
        (lambda: LeanLoop(), "LeanLoop: "),
    ],
)
def test_what_was_done_is_said_in_one_line(
    trainer_kwargs: dict[str, Any], caplog: pytest.LogCaptureFixture, callback: Any, line: str
) -> None:
    data = DataLoader(TensorDataset(torch.randn(16, 8), torch.arange(16) % 3), 8)
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 1, "callbacks": [callback()]})
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer.fit(PastLightning(past=False), data)
    assert len([r for r in caplog.records if line in r.getMessage()]) == 1
