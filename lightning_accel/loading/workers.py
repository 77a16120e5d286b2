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

from lightning_accel.arguments import flag, whole
from lightning_accel.errors import Unsupported
from lightning_accel.loading.order import EquivalentLoader, IndexOrder, stop_workers
from lightning_accel.loading.tensor_store import require_deterministic, require_plain

_KNOWN = (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
_OF_LIGHTNING = "DistributedSamplerWrapper"  # lists all of the sampler that it wraps at once


class WorkerLoader(EquivalentLoader):
    """A DataLoader's batches, made by another number of workers. Made by `with_workers`.

    The workers persist where the user's do, and else are started for each epoch: they see the dataset as it
    is then.
    """

    def __init__(self, loader: DataLoader[Any], num_workers: int, pin_memory: bool) -> None:
        super().__init__(loader)
        self.__dict__.update(num_workers=num_workers, pin_memory=pin_memory)
        self._seed = torch.Generator()
        self._inner: Any = None

    def close(self) -> None:
        """End the worker processes."""
        super().close()
        if self._inner is not None:
            stop_workers(self._inner._iterator)
            self._inner = None

    def _begin(self, seed: int) -> None:
        self.close()  # others are started for this epoch
        self._seed.manual_seed(seed)  # items that draw follow the user's seed

    def _start(self, order: IndexOrder) -> Iterator[Any]:
        return _Ahead(self, order)

    def begin(self, order: IndexOrder) -> Iterator[Any]:
        """Let the workers begin with the batches of `order`."""
        loader = self.loader
        if self._inner is None:
            self._lists = _Lists()
            self._inner = DataLoader(
                loader.dataset,
                batch_sampler=self._lists,
                num_workers=self.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=self.pin_memory,
                timeout=loader.timeout if self.num_workers else 0,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context
                if self.num_workers
                else None,
                generator=self._seed,  # the global one is the training's
                persistent_workers=loader.persistent_workers and self.num_workers > 0,
            )
        self._lists.order = order
        return iter(self._inner)


class PinnedLoader(EquivalentLoader):
    """A DataLoader with pinned memory or without, and all else of the user's. Made by `with_workers`."""

    def __init__(self, loader: DataLoader[Any], pin_memory: bool) -> None:
        super().__init__(loader)
        self.__dict__.update(pin_memory=pin_memory)
        self._inner: Any = None

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        if self._inner is None or self._inner.collate_fn is not loader.collate_fn:
            self._inner = DataLoader(
                loader.dataset,
                batch_sampler=loader.batch_sampler,
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=self.pin_memory,
                timeout=loader.timeout,
                worker_init_fn=loader.worker_init_fn,
                multiprocessing_context=loader.multiprocessing_context,
                generator=loader.generator,
                prefetch_factor=loader.prefetch_factor,
                persistent_workers=loader.persistent_workers,
            )
        self._running = iter(self._inner)
        return self._running

    def close(self) -> None:
        """End the worker processes."""
        super().close()
        if self._inner is not None:
            stop_workers(self._inner._iterator)
            self._inner = None

    def follow(self, old: Any) -> None:
        """Take the place of `old`, unless its workers persist: to start others draws a seed."""
        if self.loader.persistent_workers and old._iterator is not None:
            raise Unsupported(
                "workers that persist keep the memory that they were started with",
                "persistent_workers=True",
                "pass `pin_memory` to the DataLoader",
            )

    def adopt(self, running: Any) -> Iterator[Any]:
        """Let the epoch that has begun go on as it is."""
        self._running = running
        return iter(running)


class _Lists:
    """Stands where a batch sampler does, and gives the lists of the running order."""

    order: Any = ()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.order)


class _Ahead:
    """One epoch. The workers begin at the first batch, or at once where the user's began at once."""

    def __init__(self, loader: WorkerLoader, order: IndexOrder) -> None:
        self.order, self._loader = order, loader
        self._batches = loader.begin(order) if loader.loader.num_workers > 0 else None

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Any:
        if self._batches is None:
            self._batches = self._loader.begin(self.order)
        return next(self._batches)


def with_workers(
    loader: DataLoader[Any],
    num_workers: int,
    *,
    pin_memory: bool | None = None,
    keep_random: bool = True,
) -> WorkerLoader | PinnedLoader:
    """Give the batches of a DataLoader from another number of workers.

    Workers see the dataset as it is when their epoch begins, and each keeps its own copy: for items that
    are the same whenever and by whomever they are read.

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
    if isinstance(loader, EquivalentLoader):
        loader = loader.loader
    whole("num_workers", num_workers, least=0, do="pass 2")
    flag("pin_memory", pin_memory, none=True)
    flag("keep_random", keep_random)
    require_plain(loader)
    pins = loader.pin_memory if pin_memory is None else pin_memory
    if num_workers == loader.num_workers:
        return PinnedLoader(loader, pins)
    require_known_order(loader)
    if keep_random:
        require_deterministic(loader)
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
