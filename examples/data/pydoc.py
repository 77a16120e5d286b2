"""Python's own language reference, as `help()` prints it: 465 kB of English on every machine."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from .order import in_order, shuffled


class Pydoc(LightningDataModule):
    """Cut the text into windows of `context` bytes: 90 % train, 5 % val, 5 % test.

    `num_windows` is how many random windows make one epoch of training.
    """

    def __init__(
        self,
        batch_size: int = 16,
        context: int = 128,
        num_windows: int = 1600,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.context, self.num_windows = batch_size, context, num_windows
        self.num_workers, self.seed = num_workers, seed

    def setup(self, stage: str) -> None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics)).encode()
        corpus = torch.tensor(list(text))
        train, val, test = corpus.tensor_split([len(text) * 90 // 100, len(text) * 95 // 100])
        random = torch.Generator().manual_seed(self.seed)
        starts = torch.randint(len(train) - self.context, (self.num_windows,), generator=random)
        self.train = _windows(train, starts, self.context)
        self.val, self.test = (
            _windows(part, torch.arange(0, len(part) - self.context, self.context), self.context)
            for part in (val, test)
        )

    def train_dataloader(self) -> DataLoader:
        return shuffled(self.train, self.batch_size, self.num_workers, self.seed)

    def val_dataloader(self) -> DataLoader:
        return in_order(self.val, 2 * self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader:
        return in_order(self.test, 2 * self.batch_size, self.num_workers)


def _windows(corpus: torch.Tensor, starts: torch.Tensor, context: int) -> TensorDataset:
    pieces = corpus[starts[:, None] + torch.arange(context + 1)]
    return TensorDataset(pieces[:, :-1], pieces[:, 1:])
