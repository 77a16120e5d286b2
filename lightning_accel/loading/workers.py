"""Another number of worker processes behind a DataLoader, with the order and the random numbers of the first.

Workers are asked for batches ahead of time, and so the sampler is as well. That changes nothing where a
sampler draws all that it needs at its first batch, as torch's own do, from the global generator or one made
for the epoch. A sampler of another kind, or one with a generator that lives on, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_accel.errors import Unsupported, explain
from lightning_accel.loading.order import Order, SameBatches, stop_workers
from lightning_accel.loading.store import require_plain, require_still

_KNOWN = (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
_OF_LIGHTNING = "DistributedSamplerWrapper"  # lists all of the sampler that it wraps at once


class WorkerLoader(SameBatches):
    """A DataLoader's batches, made by another number of workers. Made by `with_workers`."""

    def __init__(self, loader: DataLoader[Any], num_workers: int, pin_memory: bool) -> None:
        super().__init__(loader)
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self._lists = _Lists(len(loader))
        self._inner = DataLoader(
            loader.dataset,
            batch_sampler=self._lists,
            num_workers=num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=pin_memory,
            timeout=loader.timeout if num_workers else 0,
            worker_init_fn=loader.worker_init_fn,
            multiprocessing_context=loader.multiprocessing_context if num_workers else None,
            generator=torch.Generator(),  # the global one is the training's
            persistent_workers=num_workers > 0,
        )

    def close(self) -> None:
        """End the worker processes."""
        stop_workers(self._inner._iterator)
        self._inner._iterator = None

    def _start(self, order: Order, before: Iterator[Any] | None = None) -> Iterator[Any]:
        return _Ahead(self, order, before)

    def begin(self, order: Order) -> Iterator[Any]:
        """Let the workers begin with the batches of `order`."""
        self._lists.order = order
        return iter(self._inner)


class _Lists:
    """Stands where a batch sampler does, and gives the lists of the running order."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.order: Any = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order)

    def __len__(self) -> int:
        return self.length


class _Ahead:
    """One epoch. The workers begin at the first batch, or at once where the user's began at once."""

    def __init__(self, loader: WorkerLoader, order: Order, before: Iterator[Any] | None) -> None:
        self.order, self._loader, self._before = order, loader, before
        eager = loader.loader.num_workers > 0 and before is None
        self._batches = loader.begin(order) if eager else None

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Any:
        if self._before is not None:
            for batch in self._before:
                self.order.ask()
                return batch
            stop_workers(self._before)
            self._before = None
        if self._batches is None:
            self._batches = self._loader.begin(self.order)
        return next(self._batches)


def with_workers(
    loader: DataLoader[Any],
    num_workers: int,
    *,
    pin_memory: bool | None = None,
    keep_random: bool = True,
) -> WorkerLoader:
    """Give the batches of a DataLoader from another number of workers, which persist.

    Args:
        loader: The user's DataLoader; it is not changed.
        num_workers: How many; 0 for none.
        pin_memory: Whether batches come in pinned memory; by default as in the DataLoader.
        keep_random: Refuse items that draw random numbers: another process draws others. `False`
            accepts other augmentations than without this call, of the same distribution.

    Raises:
        Unsupported: Batches, or their order, would not be the same.

    >>> from torch.utils.data import TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.arange(6)), batch_size=4, shuffle=True)
    >>> sum(len(batch) for (batch,) in with_workers(loader, 0))
    6
    """
    if isinstance(loader, SameBatches):
        loader = loader.loader
    if isinstance(num_workers, bool) or not isinstance(num_workers, int):
        raise TypeError(explain("`num_workers` is a whole number", repr(num_workers), "pass 2"))
    if num_workers < 0:
        raise ValueError(explain("`num_workers` is 0 or more", repr(num_workers), "pass 2"))
    for name, flag in (("pin_memory", pin_memory), ("keep_random", keep_random)):
        if not isinstance(flag, bool) and not (name == "pin_memory" and flag is None):
            raise TypeError(explain(f"`{name}` is true or false", repr(flag), "pass a bool"))
    require_plain(loader)
    if num_workers != loader.num_workers:
        require_known_order(loader)
        if keep_random:
            require_still(loader)
    pins = loader.pin_memory if pin_memory is None else pin_memory
    return WorkerLoader(loader, num_workers, pins)


def require_known_order(loader: DataLoader[Any]) -> None:
    """Raise where asking the sampler ahead of time could change what is drawn.

    Raises:
        Unsupported: With the sampler in question.
    """
    samplers: list[Any] = [loader.batch_sampler]
    while samplers[-1] is not None:
        sampler = samplers[-1]
        ours = type(sampler).__module__.startswith("lightning.")
        if type(sampler) not in _KNOWN and not (ours and type(sampler).__name__ == _OF_LIGHTNING):
            raise Unsupported(
                "other workers would ask the sampler at other moments",
                f"{type(sampler).__name__}, which may draw in between",
                "leave the number of workers as it is",
            )
        if getattr(sampler, "generator", None) is not None:
            raise Unsupported(
                "other workers would ask the sampler at other moments",
                f"a {type(sampler).__name__} with a generator of its own, which lives on",
                "leave the number of workers as it is",
            )
        samplers.append(getattr(sampler, "sampler", None))
