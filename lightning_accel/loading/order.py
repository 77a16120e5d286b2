"""The order of a DataLoader's batches, and the random numbers it costs, kept when others make them.

A DataLoader draws one number for its workers whenever it is iterated, from its own generator or from the
global one, and so moves the dropout of the whole training. With workers it also asks its sampler ahead of
time: `num_workers * prefetch_factor` lists at once, then one for each batch that it gives. `IndexOrder` asks the
user's own sampler at exactly these moments, whoever makes the batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_accel.errors import Unsupported


class IndexOrder:
    """Lists of indices from a sampler, asked for when a DataLoader would ask.

    Args:
        indices: The iterator of the user's sampler.
        ahead: How many lists the DataLoader asks for at once: 0 without workers.

    >>> list(IndexOrder(iter([[0, 1], [2]]), ahead=4))
    [[0, 1], [2]]
    """

    def __init__(self, indices: Iterator[Any], *, ahead: int = 0) -> None:
        self._indices, self._ahead = indices, ahead
        self._waiting: deque[Any] = deque()
        for _ in range(ahead):
            self._ask()

    def __iter__(self) -> IndexOrder:
        return self

    def __next__(self) -> Any:
        if not self._ahead:
            return next(self._indices)
        if not self._waiting:
            raise StopIteration
        first = self._waiting.popleft()
        self._ask()
        return first

    def _ask(self) -> None:
        for found in self._indices:
            self._waiting.append(found)
            return


class Batches:
    """Batches of one epoch: for each list of indices what `make` makes of it."""

    def __init__(self, order: IndexOrder, make: Callable[[Any], Any]) -> None:
        self.order, self._make = order, make

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        return self._make(next(self.order))


class EquivalentLoader:
    """A DataLoader's batches made in another way: same values, same order, same random numbers.

    Looks like the DataLoader to whoever reads `dataset`, `sampler`, `batch_size` and the like, or sets them.
    """

    makes_the_batches_of = "loader"
    """Where the DataLoader is that says which batches there are."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.__dict__["loader"] = loader
        self._running: Any = None

    def __iter__(self) -> Iterator[Any]:
        loader = self.loader
        indices = iter(loader.batch_sampler)
        if not (loader.persistent_workers and self._running is not None):
            seed = torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
            self._begin(int(seed))
        stop_workers(self._running)
        self._running = self._start(IndexOrder(indices, ahead=_ahead(loader)))
        return self._running

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in self.__dict__:
            super().__setattr__(name, value)
        else:
            setattr(self.loader, name, value)

    @property
    def _iterator(self) -> Any:
        """What Lightning sets to `None` when it has done with the workers."""
        return self._running

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        if value is None:
            self.close()
        self._running = value

    def close(self) -> None:
        """End what runs in the background."""
        stop_workers(self._running)

    def follow(self, old: Any) -> None:
        """Take the place of `old`, a loader of the same batches that may have been iterated before."""
        if isinstance(old, EquivalentLoader):
            self._running = old._running
        elif self.loader._iterator is not None:  # workers that persist
            self._running = self.loader._iterator
            self.loader._iterator = None

    def adopt(self, running: Any) -> Iterator[Any]:
        """Return an iterator that goes on where one of the DataLoader is, with nothing drawn twice.

        What workers have begun they end: they see the data as it was when they were started.

        Raises:
            Unsupported: `running` is no iterator of a DataLoader or of ours.
        """
        if isinstance(running, Batches):
            self._running = self._start(running.order)
            return self._running
        indices = getattr(running, "_sampler_iter", None)
        workers = getattr(running, "_num_workers", None)
        if indices is None or workers is None:
            raise Unsupported(
                "the batches of this epoch are under way in a form that cannot be taken over",
                type(running).__name__,
                "nothing: the next epoch comes from the new loader",
            )
        self._running = running if workers else self._start(IndexOrder(indices))
        return self._running

    def _begin(self, seed: int) -> None:
        """Do what is due where a DataLoader would start its workers, with this seed."""

    def _start(self, order: IndexOrder) -> Iterator[Any]:
        raise NotImplementedError


def stop_workers(running: Any) -> None:
    """End the worker processes of a DataLoader's iterator, if it has any; they may be persistent."""
    stop = getattr(running, "_shutdown_workers", None)
    if stop is not None:
        stop()


def _ahead(loader: DataLoader[Any]) -> int:
    return loader.num_workers * (loader.prefetch_factor or 0)
