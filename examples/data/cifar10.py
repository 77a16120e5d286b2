"""60000 colour photographs of 32x32 pixels (Krizhevsky, 2009); downloaded on first use."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from .order import in_order, shuffled


class CIFAR10(LightningDataModule):
    """Hold the images in memory; the last 5000 training images are val."""

    def __init__(
        self, root: str = ".cache", batch_size: int = 128, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.num_workers, self.seed = (
            root,
            batch_size,
            num_workers,
            seed,
        )

    def prepare_data(self) -> None:
        for train in (True, False):
            _torchvision_cifar10()(self.root, train=train, download=True)

    def setup(self, stage: str) -> None:
        x, y = self._read(train=True)
        self.train = TensorDataset(x[:-5000], y[:-5000])
        self.val = TensorDataset(x[-5000:], y[-5000:])
        self.test = TensorDataset(*self._read(train=False))

    def train_dataloader(self) -> DataLoader:
        return shuffled(self.train, self.batch_size, self.num_workers, self.seed)

    def val_dataloader(self) -> DataLoader:
        return in_order(self.val, 2 * self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return in_order(self.test, 2 * self.batch_size, self.num_workers)

    def _read(self, *, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        source = _torchvision_cifar10()(self.root, train=train)
        x = torch.tensor(source.data).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        return x.contiguous(), torch.tensor(source.targets)


def _torchvision_cifar10() -> Any:  # torchvision may be absent
    try:
        from torchvision.datasets import CIFAR10 as Source
    except ImportError as error:
        raise ImportError(
            "data=cifar10 needs torchvision, which is not installed. "
            "Do: pip install 'lightning-accel[vision]', from the index that your torch came from."
        ) from error
    return Source
