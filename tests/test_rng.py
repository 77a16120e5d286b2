"""Random states that trials leave as they were, those that GPUs have only been promised included."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AutoTune, StructuredPruning
from lightning_accel.surgery.call import same_random_state
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.surgery.rng import seed_rng

Promise = Callable[[], Any]


@pytest.fixture
def promised(monkeypatch: pytest.MonkeyPatch) -> Promise:
    """Return what tells with which seed CUDA would be started now, on a machine where nobody has started it."""
    tracker: Any = torch.cuda._lazy_seed_tracker  # type: ignore[attr-defined]
    monkeypatch.setattr(tracker, "manual_seed_all_cb", tracker.manual_seed_all_cb)
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is started already")
    return lambda: tracker.manual_seed_all_cb


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.MLP()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_seed_begins_all_that_draws_on_the_cpu_anew() -> None:
    def draw() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(2).tolist()

    seed_rng(3)
    first = draw()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    assert first == draw()


def test_what_cuda_was_promised_stays(promised: Promise) -> None:
    torch.manual_seed(42)
    wanted = promised()
    seed_rng(0)
    assert promised() is wanted
    with preserve_rng():
        torch.manual_seed(0)
        assert promised() is not wanted
    assert promised() is wanted


@pytest.mark.parametrize("users", [42, None])
def test_cuda_that_starts_within_a_trial_gets_the_promised_seed(
    promised: Promise, monkeypatch: pytest.MonkeyPatch, users: int | None
) -> None:
    """The teacher of a configuration trains on the GPU before the user's fit touches it."""
    generators = [torch.Generator() for _ in range(2)]  # in the place of two GPUs
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 2)
    if users is None:
        torch.cuda._lazy_seed_tracker.manual_seed_all_cb = None  # type: ignore[attr-defined]
        torch.default_generator.seed()
        users = torch.initial_seed()
    else:
        torch.manual_seed(users)
    with preserve_rng():
        torch.manual_seed(0)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda.random, "_lazy_call", lambda call, **_: call())
        torch.cuda.manual_seed_all(0)
    assert [generator.initial_seed() for generator in generators] == [users] * 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:StructuredPruning cuts before")
@pytest.mark.parametrize("technique", ["prune", "tune"])
def test_a_fit_on_the_cpu_promises_no_other_seed_to_cuda(
    promised: Promise, trainer_kwargs: dict[str, Any], technique: str
) -> None:
    torch.manual_seed(42)
    wanted = promised()
    callback = (
        StructuredPruning(ratio=0.5, when=0)
        if technique == "prune"
        else AutoTune(budget_s=60, budget_share=1e9, techniques=["fused_optimizer"], cache=False)
    )
    data = DataLoader(TensorDataset(torch.ones(4, 8)), 2)
    Trainer(**trainer_kwargs, callbacks=[callback]).fit(Module(), data)
    assert promised() is wanted


def test_a_networks_own_state_is_begun_anew_and_put_back(promised: Promise) -> None:
    torch.manual_seed(42)
    net = nn.Linear(1, 1)
    wanted, before = promised(), torch.get_rng_state()
    with same_random_state(net, seed=0):
        first = torch.rand(1)
    with same_random_state(net, seed=0):
        assert torch.equal(first, torch.rand(1))
    assert torch.equal(before, torch.get_rng_state()) and promised() is wanted
