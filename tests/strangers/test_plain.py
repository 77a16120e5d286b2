"""Reports about onlookers that change a training without a word, each against a loop of plain PyTorch or Lightning."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import odd
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import (
    AccelReport,
    AutoTune,
    Distillation,
    FastLoading,
    SparsityTraining,
    StructuredPruning,
    tune,
)
from lightning_accel.bridge.data import ReadOnce
from lightning_accel.tuning import benchmark_pool

pytestmark = pytest.mark.filterwarnings("ignore")

X, Y = torch.arange(24.0).view(24, 1).repeat(1, 4) / 24, torch.arange(24) % 3


class Reported(LightningModule):
    """Dropout draws in each step, so that whoever draws too shows in the next loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.order: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.order.append((batch[0][:, 0].tolist(), loss.item()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]) + torch.rand(()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), 6, shuffle=True)


def begin() -> Reported:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7)
    return Reported()


ONLOOKERS: dict[str, Callable[[], Callback]] = {
    "prune": lambda: StructuredPruning(ratio=0.5, when=8),
    "sparsity": lambda: SparsityTraining(strength=1e-300),
    "loading": lambda: FastLoading(budget_s=0.01),
    "report": lambda: AccelReport(budget_s=0.01),
    "tune": lambda: AutoTune(budget_share=1e-12, cache=False),
    "distill": lambda: Distillation(teacher(), {"kd": 0.0}),
}


def teacher() -> nn.Module:
    with torch.random.fork_rng():
        return Reported().net


def by_hand(epochs: int) -> list[Any]:
    """The loop that was ported to Lightning."""
    module, data = begin(), loader()
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for index, batch in enumerate(data):
            optimizer.zero_grad()
            module.training_step(batch, index).backward()
            optimizer.step()
    return module.order


@pytest.mark.parametrize("name", ONLOOKERS)
def test_the_order_and_the_losses_are_those_of_the_loop_by_hand(
    trainer_kwargs: dict[str, Any], name: str
) -> None:
    """Lightning#6988: a sanity check of two batches changed how the training data were shuffled."""
    module, onlooker = begin(), ONLOOKERS[name]()
    given = {**trainer_kwargs, "max_epochs": 10, "max_steps": 8, "num_sanity_val_steps": 2}
    given["limit_val_batches"] = 2
    trainer = Trainer(**given, callbacks=[onlooker], check_val_every_n_epoch=100)
    trainer.fit(module, loader(), DataLoader(TensorDataset(X, Y), 6))
    assert module.order == by_hand(2)


class Restores(Callback):
    """A user's callback that keeps random states in checkpoints, as many do."""

    def state_dict(self) -> dict[str, Any]:
        return {"torch": torch.get_rng_state(), "python": list(random.getstate()[1])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if hasattr(self, "state"):
            torch.set_rng_state(self.state["torch"])
            random.setstate((3, tuple(self.state["python"]), None))


@pytest.mark.parametrize("name", ONLOOKERS)
def test_random_states_that_were_restored_are_not_used_up_before_the_first_step(
    trainer_kwargs: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """NVIDIA-NeMo/Megatron-Bridge#5255: a warm-up drew from the states that a resume had just restored."""

    def fit(module: Reported, *callbacks: Callback, ckpt: Any = None, steps: int = 12) -> None:
        saver = ModelCheckpoint(tmp_path, save_top_k=-1)
        given = {**trainer_kwargs, "max_epochs": 10, "max_steps": steps}
        given["enable_checkpointing"] = True
        trainer = Trainer(**given, callbacks=[Restores(), *callbacks, saver])
        trainer.fit(module, loader(), ckpt_path=ckpt)

    fit(begin(), steps=8)
    runs = []
    for callbacks in ([], [ONLOOKERS[name]()]):
        torch.manual_seed(99)
        runs.append(Reported())
        fit(runs[-1], *callbacks, ckpt=tmp_path / "epoch=1-step=8.ckpt")
    plain, resumed = runs
    assert len(plain.order) == 4 and resumed.order == plain.order
    assert all(map(torch.equal, plain.state_dict().values(), resumed.state_dict().values()))


def test_a_teacher_that_is_loaded_draws_nothing(
    trainer_kwargs: dict[str, Any], tmp_path: Path
) -> None:
    """Lightning#20204: to load a checkpoint builds a module, whose first weights are drawn."""
    trainer = Trainer(**{**trainer_kwargs, "max_epochs": 1})
    trainer.fit(begin(), loader())
    trainer.save_checkpoint(tmp_path / "teacher.ckpt")
    module = begin()
    distill = Distillation(tmp_path / "teacher.ckpt", {"kd": 0.0})
    Trainer(**trainer_kwargs, callbacks=[distill]).fit(module, loader())
    assert module.order == by_hand(2)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(odd.LOADERS)[::4])
def test_what_was_measured_before_does_not_change_the_training(
    trainer_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """fastai#3013, Lightning#9672: to look for a learning rate first, or twice, changed what was trained."""

    def fit(times: int) -> Any:
        for seed in (torch.manual_seed, random.seed, np.random.seed):
            seed(0)
        module, data = odd.Plain(), odd.LOADERS[name]()
        for _ in range(times):
            tune(module, data, techniques="float8", cache=False)
        assert not module.calls and all(p.grad is None for p in module.parameters())
        Trainer(**trainer_kwargs, limit_train_batches=5).fit(module, data)
        return module.calls, float(torch.rand(())), random.random(), float(np.random.rand())

    monkeypatch.setattr(benchmark_pool, "_BLOCK_S", 1e-9)
    plain = fit(0)
    assert plain[0]
    try:
        assert fit(2) == plain
    except ReadOnce:  # refused, and said
        assert "one shot" in name or name in ("persistent", "consumes")


class Looks(Callback):
    """Shows a batch at the start, by way of the user's own loader."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        next(iter(trainer.train_dataloader))


@pytest.mark.parametrize("name", ONLOOKERS)
def test_beside_a_callback_that_takes_a_batch_all_is_as_without_ours(
    trainer_kwargs: dict[str, Any], name: str
) -> None:
    """fastai#3512: one batch taken to look at it changed the order; ours must neither add nor take away."""

    def order(*callbacks: Callback) -> list[Any]:
        module = begin()
        given = {**trainer_kwargs, "max_epochs": 10, "max_steps": 8}
        Trainer(**given, callbacks=[*callbacks, Looks()]).fit(module, loader())
        return module.order

    assert order(ONLOOKERS[name]()) == order() != by_hand(2)
