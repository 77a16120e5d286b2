"""A finite number of random views of each sample, so that what a teacher said of one can be reused.

Random augmentation makes every epoch new to the teacher, and a cache of its answers stays cold.
Here item i of epoch e is drawn with random states that depend on (seed, i, e mod views) alone: after
`views` epochs every view was seen once, and with V views in E epochs the teacher runs for a share V/E.

Somebody has to say which epoch it is. `Distillation` does, for all views that it finds within the training data,
however they are wrapped; a loop of one's own calls `set_epoch`.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lightning_accel.arguments import whole
from lightning_accel.errors import explain
from lightning_accel.surgery.preserve import runs

_MAX_NODES, _MANY = 100_000, 1000
"""Objects that are looked at, and entries of one container."""
_MAIN, _WORKERS = 3, 4
_ENDS = (
    str,
    bytes,
    int,
    float,
    complex,
    type(None),
    type,
    ModuleType,
    Tensor,
    np.ndarray,
    nn.Module,
)


class SeededViews(Dataset):
    """Wrap a map-style dataset so that each item has `views` random versions, one per epoch in turn.

    What `random`, `numpy.random` and the CPU generator of torch draw inside the dataset is covered;
    a generator of the dataset's own is not. The states of the process are put back after each item.
    When items are asked for a third time and nobody has ever set the epoch, there is a warning; of items that workers
    make, one worker gives it, and the main process when a sampler asks for the length.

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
        self.views = whole("views", views)
        self.seed = whole("seed", seed, least=0)
        # in shared memory: worker processes that live on see the epoch of the main process
        # epoch, was it set, items, and who has warned
        self._state = torch.zeros(5, dtype=torch.int64).share_memory_()

    @property
    def epoch(self) -> int:
        """The epoch whose views are drawn."""
        return int(self._state[0])

    def set_epoch(self, epoch: int) -> None:
        """Draw the views of `epoch` from now on, in the workers of a running DataLoader as well."""
        self._state[0], self._state[1] = epoch, 1

    def __len__(self) -> int:
        size = len(self.dataset)
        if self.views > 1 and not self._state[1] and self._state[2] > 2 * size:
            self._warn()
        return size

    def __getitem__(self, index: int) -> Any:
        if self.views > 1 and not self._state[1]:
            self._count()
        number = int(index) % len(self.dataset) if int(index) < 0 else int(index)
        with _seeded(f"{self.seed} {number} {self.epoch % self.views}"):
            return self.dataset[index]

    def _count(self) -> None:
        """Count an item, and warn where one view is shown for ever; workers may miss some of each other's."""
        self._state[2] += 1
        if self._state[2] > 2 * len(self.dataset):
            self._warn()

    def _warn(self) -> None:
        here = _MAIN if get_worker_info() is None else _WORKERS
        if self._state[here]:
            return
        self._state[here] = 1
        warnings.warn(
            explain(
                f"`SeededViews` of {self.views} views shows one of them for ever",
                f"{2 * len(self.dataset)} items were drawn, and nobody has set the epoch",
                "call `set_epoch(epoch)` at the start of each, or keep the dataset where `Distillation` "
                "finds it: in an attribute of the loader's dataset",
            ),
            stacklevel=4,
        )


def views_in(*data: Any) -> list[SeededViews]:
    """Return all `SeededViews` within loaders and datasets, behind whatever attributes and containers.

    >>> views = SeededViews([1, 2], 2)
    >>> views_in({"train": [torch.utils.data.ConcatDataset([[0], views])]}) == [views]
    True
    """
    found, seen, ahead = [], set[int](), deque(data)
    kept = []  # so that no id comes again
    while ahead and len(seen) < _MAX_NODES:
        value = ahead.popleft()
        if isinstance(value, _ENDS) or id(value) in seen or runs(value):
            continue
        seen.add(id(value))
        kept.append(value)
        if isinstance(value, SeededViews):
            found.append(value)
        ahead.extend(_within(value))
    return found


def _within(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        yield from islice(value.values(), _MANY)
    elif isinstance(value, (list, tuple, set, deque)):
        yield from islice(value, _MANY)
    yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            yield getattr(value, name, None)
    if callable(value):  # a collate function, a method, a partial, or what a function closes over
        yield from (getattr(value, name, None) for name in ("__self__", "func", "args"))
        for cell in getattr(value, "__closure__", None) or ():
            with suppress(ValueError):  # a name that its function has not bound yet
                yield cell.cell_contents


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
