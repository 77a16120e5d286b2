"""The network and the data of the project."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule


class Net(LightningModule):
    def __init__(self, optimizer: Any = None) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)
        )
        self.dtypes: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        out = self(batch[0])
        self.dtypes.add(out.dtype)
        return torch.nn.functional.cross_entropy(out.float(), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", torch.nn.functional.cross_entropy(self(batch[0]).float(), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def rows() -> Any:
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, :3].argmax(1)), 8)
