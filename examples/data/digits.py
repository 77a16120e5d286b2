"""1797 handwritten digits of 8x8 pixels, bundled with scikit-learn (UCI, 1998)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset

from .order import in_order, shuffled


class Digits(LightningDataModule):
    """Split the digits 70/10/20 into train, val and test, the same way every time.

    With `num_train`, that many samples of the training part are used, equally of each class; `seed` says
    which, and more of them hold all of fewer.
    """

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        num_train: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.num_train = num_train

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        y = torch.tensor(digits.target)
        x = torch.tensor(digits.images, dtype=torch.float32).div(8).sub(1).unsqueeze(1)
        rest, test = train_test_split(range(len(y)), test_size=0.2, stratify=y, random_state=0)
        train, val = train_test_split(rest, test_size=0.125, stratify=y[rest], random_state=0)
        self.train, self.val, self.test = (
            TensorDataset(x[part], y[part]) for part in (train, val, test)
        )
        if self.num_train is not None:
            few = _balanced(self.train.tensors[1], self.seed)[: self.num_train]
            self.train = TensorDataset(*(tensor[few] for tensor in self.train.tensors))

    def train_dataloader(self) -> DataLoader:
        batch_size = min(self.batch_size, len(self.train))
        return shuffled(self.train, batch_size, self.num_workers, self.seed)

    def val_dataloader(self) -> DataLoader:
        return in_order(self.val, 256, self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return in_order(self.test, 256, self.num_workers)


def _balanced(labels: torch.Tensor, seed: int) -> torch.Tensor:
    """Return a random order of samples whose every beginning holds all classes alike."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = labels[order]
    earlier = one_hot(classes).cumsum(0).gather(1, classes[:, None]).squeeze(1)  # of its own class
    return order[earlier.argsort(stable=True)]
