"""Reports about weights that autocast had cast before they changed, each against Lightning's `bf16-mixed`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AutocastPrecision

pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"
)


class Reported(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        self.seen: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]).float(), batch[1])
        self.seen.append(loss.detach().clone())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.5)


class FirstUnderNoGrad(Reported):
    """Lightning#20644, pytorch#65766: computed without a graph first, weights got no gradient afterwards."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.loss(batch)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        assert all(p.grad is not None for p in self.parameters())
        optimizer.step()


class Perturbed(Reported):
    """davda54/sam#7, #11: the second gradient of a sharpness-aware step belongs to moved weights."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        moved = [0.5 * p.grad for p in self.parameters() if p.grad is not None]
        for p, by in zip(self.parameters(), moved, strict=True):
            p.data.add_(by)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for p, by in zip(self.parameters(), moved, strict=True):
            p.data.sub_(by)
        optimizer.step()


class InnerLoop(Reported):
    """X-GenGroup/Flow-Factory#186: a loop of optimizer steps within one context had a flat loss."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inner = torch.optim.SGD(self.net.parameters(), 0.5)
        for _ in range(4):
            inner.zero_grad()
            self.manual_backward(self.loss(batch))
            inner.step()


class SwappedAverage(Reported):
    """X-GenGroup/Flow-Factory#186, NVIDIA/apex#132: an average stands in for the weights between forwards."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.loss(batch))
        kept = copy.deepcopy(self.net.state_dict())
        with torch.no_grad():
            for p in self.net.parameters():
                p.data.mul_(0.9)
            self.loss(batch)
        self.net.load_state_dict(kept)
        self.loss(batch)
        self.optimizers().step()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [FirstUnderNoGrad, Perturbed, InnerLoop, SwappedAverage])
def test_every_value_is_lightnings(
    trainer_kwargs: dict[str, Any], kind: Callable[[], Reported]
) -> None:
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(16, 8, generator=generator), torch.arange(16) % 3)

    def run(**kwargs: Any) -> Reported:
        module = kind()
        Trainer(**{**trainer_kwargs, "max_epochs": 2, **kwargs}).fit(module, DataLoader(data, 8))
        return module

    stock, ours = run(precision="bf16-mixed"), run(plugins=[AutocastPrecision("bf16-mixed")])
    assert [float(x) for x in stock.seen] == [float(x) for x in ours.seen]
    assert all(map(torch.equal, stock.parameters(), ours.parameters()))
    assert len({round(float(x), 4) for x in ours.seen}) > 2
