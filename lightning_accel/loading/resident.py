"""A whole dataset in memory: each batch is one look-up instead of a Python call for every item.

Reading item by item and stacking costs about a microsecond per item and tensor at the very least, and
workers add a copy between processes; one `index_select` has neither. What comes out is equal bit for bit,
and so are the random numbers: see `store` for how that is proved and `order` for how it is kept.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from lightning_accel.errors import Unsupported, explain
from lightning_accel.loading.determinism import fingerprint
from lightning_accel.loading.order import Batches, EquivalentLoader, IndexOrder, stop_workers
from lightning_accel.loading.rows import Rows, rows, why_not_now
from lightning_accel.loading.tensor_store import (
    TensorStore,
    build,
    prove,
    reader,
    require_plain,
    too_large,
)

SHARE = 0.2
_SPOT_ITEMS = 2


class ResidentLoader(EquivalentLoader):
    """A DataLoader's batches, looked up in `Rows` or in a `TensorStore`. Made by `resident`.

    Whenever it is iterated, what shows a change is compared: whether the dataset still is its rows; of one that
    is held, all that it keeps, and two items. If they differ, the DataLoader itself gives the batches from then
    on, and of a dataset that was held a warning says so.
    """

    def __init__(self, loader: DataLoader[Any], store: TensorStore | Rows) -> None:
        super().__init__(loader)
        self.__dict__["store"] = store
        self._times = 0
        self._stale = False
        self._frozen: Rows | None = None
        self._collate = loader.collate_fn
        self._kept = None if isinstance(store, Rows) else fingerprint(loader.dataset)
        self._pins = (
            loader.pin_memory and store.device.type == "cpu" and torch.accelerator.is_available()
        )

    def __iter__(self) -> Iterator[Any]:
        if self._stale or not self._unchanged():
            self._running = iter(self.loader)
            return self._running
        return super().__iter__()

    def close(self) -> None:
        """End the worker processes of the DataLoader, if it has made batches itself."""
        super().close()
        stop_workers(self.loader._iterator)
        self.loader._iterator = None

    def follow(self, old: Any) -> None:
        """Take the place of `old`, unless workers persist that hold what its rows were."""
        if isinstance(self.store, Rows) and self.loader.persistent_workers and old._iterator:
            raise Unsupported(
                "workers that persist hold the data as it was when they were started",
                "persistent_workers=True",
                "pass FastLoading to the Trainer, which begins with the fit",
            )
        super().follow(old)

    def _unchanged(self) -> bool:
        if isinstance(self.store, Rows):
            return not why_not_now(self.loader)
        self._times += 1
        try:
            if self._collate is not self.loader.collate_fn:
                raise Unsupported("another `collate_fn` has been set")
            if self._kept is not None and self._kept != fingerprint(self.loader.dataset):
                raise Unsupported("what the dataset keeps has changed")
            size = min(_SPOT_ITEMS, self.store.num_items)
            prove(self.store, self.loader, count=1, seed=self._times, size=size)
        except Unsupported:
            self._stale = True
            what = "a dataset that was held in memory has changed, and is read item by item again"
            do = "hold it only once it is complete, or exclude it with resident=False"
            warnings.warn(explain(what, type(self.loader.dataset).__name__, do), stacklevel=3)
        return not self._stale

    def _begin(self, seed: int) -> None:
        self._frozen = None

    def _start(self, order: IndexOrder) -> Iterator[Any]:
        store, plain = self.store, reader(self.loader)
        if isinstance(store, Rows) and self.loader.num_workers:
            self._frozen = store = self._frozen or store.frozen()
            plain = reader(self.loader, store.dataset)

        def make(indices: Any) -> Any:
            batch = store.take(indices)
            batch = plain(indices) if batch is None else batch
            return _pinned(batch) if self._pins else batch

        return Batches(order, make)


def resident(
    loader: DataLoader[Any],
    device: torch.device | str = "cpu",
    *,
    limit_bytes: int | None = None,
    limit_s: float = 60.0,
) -> ResidentLoader:
    """Hold a map-style dataset in memory, and give the batches of its DataLoader from there.

    Same batches in the same order, bit for bit, and the same random numbers drawn, with any sampler. Rows of a
    `TensorDataset` are looked up in its own tensors on the CPU, without a copy. Of any other dataset, and on
    another device, you vouch that items stay as they are and that to read them leaves no trace: all are read.

    Args:
        loader: The user's DataLoader; it is not changed.
        device: Where the tensors are held.
        limit_bytes: The most that a copy may take; by default a fifth of the memory that is free.
        limit_s: The longest that reading all items may take, in seconds, estimated from a few.

    Raises:
        Unsupported: It cannot be held, with the reason: random transforms, items of different shapes,
            a `collate_fn` that does more than to stack, an `IterableDataset`, no room.

    >>> from torch.utils.data import TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.arange(6)), batch_size=4)
    >>> [batch for (batch,) in resident(loader)]
    [tensor([0, 1, 2, 3]), tensor([4, 5])]
    """
    if isinstance(loader, EquivalentLoader):
        loader = loader.loader
    check_limits(limit_bytes, limit_s)
    device = torch.device(device)
    require_plain(loader)
    limit = int(SHARE * free_bytes(device)) if limit_bytes is None else limit_bytes
    if device.type == "cpu" and not why_not_now(loader):
        return ResidentLoader(loader, look_up(loader, limit))
    return ResidentLoader(loader, build(loader, device=device, limit_bytes=limit, limit_s=limit_s))


def look_up(loader: DataLoader[Any], limit_bytes: int) -> Rows:
    """Return the look-up in a dataset's own tensors; in place of workers it takes a copy of them.

    Raises:
        Unsupported: The batches may be more than rows of tensors, or the copy is too large.
    """
    found = rows(loader)
    if loader.num_workers and found.num_bytes > limit_bytes:
        raise too_large(found.num_bytes, limit_bytes)
    return found


def check_limits(limit_bytes: int | None, limit_s: float) -> None:
    """Raise unless these are a number of bytes and of seconds."""
    if limit_bytes is not None and (isinstance(limit_bytes, bool) or type(limit_bytes) is not int):
        raise TypeError(
            explain("`limit_bytes` is a whole number", repr(limit_bytes), "pass 2_000_000_000")
        )
    if limit_bytes is not None and limit_bytes <= 0:
        raise ValueError(explain("`limit_bytes` is above 0", repr(limit_bytes), "pass bytes"))
    if isinstance(limit_s, bool) or not isinstance(limit_s, (int, float)):
        raise TypeError(explain("a time is a number of seconds", repr(limit_s), "pass 60.0"))
    if not limit_s > 0:
        raise ValueError(explain("a time is above 0 seconds", repr(limit_s), "pass 60.0"))


def free_bytes(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device; 0 where it does not say.

    >>> free_bytes(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return 0
    room = [_system_free()]
    try:  # a container may have less than its machine
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit.isdigit():
            room.append(max(0, int(limit) - int(used)))
    except OSError:
        return room[0]
    return min(room)


def _system_free() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return 0  # a system that does not say


def _pinned(batch: Any) -> Any:
    return tree_map(lambda x: x.pin_memory() if isinstance(x, Tensor) else x, batch)
