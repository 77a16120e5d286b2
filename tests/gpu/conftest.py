"""What the tests of GPUs share: a module, a fit, and the device: CUDA, or the CPU with `ACCEL_GPU_TESTS_ON=cpu`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

ON = os.environ.get("ACCEL_GPU_TESTS_ON", "cuda")
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all of this folder: they skip without CUDA, unless the CPU is to stand in."""
    for item in items:
        if ON == "cuda" and HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


class Module(LightningModule):
    """The user's, untouched; it notes where it computes, and in which format."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or tiny.MLP()
        self.seen: set[str] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out = self.net(batch[0])
        self.seen.add(f"{out.device.type} {str(out.dtype)[6:]}")
        return F.cross_entropy(out.float(), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


@pytest.fixture
def device() -> str:
    return ON


@pytest.fixture
def data() -> DataLoader[Any]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, torch.arange(32) % 4), 4)


@pytest.fixture
def fit(tmp_path: Path, data: Any) -> Callable[..., tuple[Module, Trainer]]:
    """Train on the device, or where it is said, and return the module and its Trainer."""

    def run(where: str = ON, **given: Any) -> tuple[Module, Trainer]:
        torch.manual_seed(0)
        module = given.pop("module", None) or Module(given.pop("net", None))
        kind = {"cuda": "gpu"}.get(where, where)
        trainer = Trainer(**{**tiny.silent(tmp_path), "accelerator": kind, **given})
        trainer.fit(module, data)
        return module, trainer

    return run


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().cpu().flatten() for p in module.parameters()])


@pytest.fixture(name="weights")
def _weights() -> Callable[[nn.Module], Tensor]:
    return weights
