"""A finite number of random views of each sample, so that what a teacher said of one can be reused.

Random augmentation makes every epoch new to the teacher, and a cache of its answers stays cold.
Here item i of epoch e is drawn with random states that depend on (seed, i, e mod views) alone: after
`views` epochs every view was seen once, and with V views in E epochs the teacher runs for a share V/E.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from lightning_accel.distillation.arguments import whole
from lightning_accel.errors import explain


class SeededViews(Dataset):
    """Wrap a map-style dataset so that each item has `views` random versions, one per epoch in turn.

    What `random`, `numpy.random` and the CPU generator of torch draw inside the dataset is covered;
    a generator of the dataset's own is not. The states of the process are put back after each item.

    Args:
        dataset: A dataset with `__getitem__` and `__len__`.
        views: Versions of each item, at least 1.
        seed: Another seed gives other versions.

    Raises:
        TypeError: The dataset has no length or no items (an `IterableDataset`).
        ValueError: `views` is less than 1.

    >>> class Noise(Dataset):
    ...     def __len__(self): return 4
    ...     def __getitem__(self, index): return float(torch.rand(()))
    >>> data = SeededViews(Noise(), views=2)
    >>> first = data[0]
    >>> data.set_epoch(1); second = data[0]
    >>> data.set_epoch(2); data[0] == first, second == first
    (True, False)
    """

    def __init__(self, dataset: Any, views: int, *, seed: int = 0) -> None:
        known = hasattr(type(dataset), "__getitem__") and hasattr(type(dataset), "__len__")
        if not known or isinstance(dataset, IterableDataset):
            raise TypeError(
                explain(
                    "`SeededViews` needs a dataset with a length and items that have a number",
                    type(dataset).__name__,
                    "make it a map-style dataset, or draw its views yourself",
                )
            )
        self.dataset = dataset
        self.views = whole(views, "views", 1)
        self.seed = whole(seed, "seed", 0)
        # in shared memory: worker processes that live on see the epoch of the main process
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose views are drawn."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of `epoch` from now on, in the workers of a running DataLoader as well."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        number = int(index) % len(self) if int(index) < 0 else int(index)
        with _seeded(f"{self.seed} {number} {self.epoch % self.views}"):
            return self.dataset[index]


@contextmanager
def _seeded(text: str) -> Iterator[None]:
    """Seed the three global generators of the CPU from `text`, and put their states back."""
    words = hashlib.blake2b(text.encode(), digest_size=24).digest()
    # each its own: `random` and numpy are the same generator and would draw the same numbers
    own, numpys, torchs = (int.from_bytes(words[i : i + 8], "little") for i in (0, 8, 16))
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(own)
        np.random.seed([numpys & 0xFFFFFFFF, numpys >> 32])
        torch.default_generator.manual_seed(torchs)  # torch.manual_seed would seed every GPU too
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
