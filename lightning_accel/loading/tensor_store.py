"""A map-style dataset as stacked tensors, proved equal to what its DataLoader gives.

What a DataLoader makes of a list of indices is treated as a black box. It may be replaced by rows of a
tensor when every item has the same shapes and dtypes, reading it draws no random number and gives the
same twice, and a batch is nothing but its items one above the other. A `collate_fn` of the user's own has
to show the last for every item, not for a sample: each is put into a batch and read alone.

That items stay the same later on cannot be proved: the user vouches for it. What shows is noticed: whenever
the loader is iterated, all that the dataset keeps in its attributes is compared, and a few items are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    MapDataPipe,
    StackDataset,
    Subset,
    default_collate,
)

from lightning_accel.errors import Unsupported
from lightning_accel.loading.determinism import Draws, same
from lightning_accel.loading.rows import Rows, number, why_not_now
from lightning_accel.surgery.preserve import preserve_rng

_SAMPLE = 8
_PROOFS = 3


class TensorStore(NamedTuple):
    """Rows of every leaf of a batch, copied from the dataset as it was once."""

    leaves: tuple[Tensor, ...]
    dims: tuple[tuple[int, ...], ...]
    """Where each dimension of a stored leaf is found in a batch: memory formats survive."""
    spec: TreeSpec
    num_items: int

    @property
    def copied(self) -> bool:
        """All of it is."""
        return True

    @property
    def num_bytes(self) -> int:
        """How many bytes the rows take."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.leaves[0].device

    def take(self, indices: Any) -> Any:
        """Return the batch of some items, in new memory; `None` where a sampler asks for something else."""
        if not isinstance(indices, (list, tuple, Tensor, np.ndarray)):
            return None
        wanted = [number(i) for i in indices]
        if not wanted or any(
            i is None or not -self.num_items <= i < self.num_items for i in wanted
        ):
            return None
        picked = torch.tensor([i % self.num_items for i in wanted if i is not None])
        taken = [
            _in_batch(leaf.index_select(0, picked.to(leaf.device, non_blocking=True)), dims)
            for leaf, dims in zip(self.leaves, self.dims, strict=True)
        ]
        return tree_unflatten(taken, self.spec)


def reader(loader: DataLoader[Any], dataset: Any = None) -> Callable[[Any], Any]:
    """Return what makes a batch of a list of indices, as a DataLoader without workers does it.

    Args:
        loader: The DataLoader.
        dataset: Where to read instead of its own dataset.
    """
    dataset = loader.dataset if dataset is None else dataset
    collate = loader.collate_fn
    at_once = getattr(dataset, "__getitems__", None)
    if at_once:
        return lambda indices: collate(at_once(indices))
    return lambda indices: collate([dataset[i] for i in indices])


def require_plain(loader: Any) -> None:
    """Raise unless this is a DataLoader whose batches are lists of items of a map-style dataset.

    Raises:
        Unsupported: With the reason.
    """
    found, do = "", "leave this loader as it is"
    if type(loader) is not DataLoader:
        found = f"a loader of its own kind, {type(loader).__name__}"
    elif isinstance(loader.dataset, (IterableDataset, MapDataPipe)):
        found = f"{type(loader.dataset).__name__}, whose items have no fixed place"
    elif loader.batch_sampler is None:
        found = "batch_size=None: the dataset makes its own batches"
    elif not loader.in_order:
        found = "in_order=False: the order of the batches is left to chance"
    elif _length(loader.dataset) < 1 or _length(loader.batch_sampler) < 0:
        found = "a dataset without items, or a dataset or sampler without a length"
    elif callable(getattr(loader.dataset, "set_epoch", None)):
        found = f"{type(loader.dataset).__name__}.set_epoch: its items change with the epoch"
    elif loader.num_workers and not _known_start(loader.worker_init_fn):
        found, do = "a `worker_init_fn`, which may prepare the dataset", "drop it if it only seeds"
    if found:
        raise Unsupported("these batches cannot be made in another way", found, do)


def require_deterministic(loader: DataLoader[Any]) -> float:
    """Read a few items twice, and return the seconds that one takes.

    Raises:
        Unsupported: An item draws random numbers, differs from read to read, or cannot be read.
    """
    read, total = reader(loader), _length(loader.dataset)
    picked = [0, *Random(0).sample(range(total), min(total, _SAMPLE) - 1)]
    with preserve_rng(loader.dataset, loader.collate_fn):
        draws = Draws(loader.dataset, loader.collate_fn)
        start = time.perf_counter()
        try:
            once = [read([i]) for i in picked]
            seconds = (time.perf_counter() - start) / len(picked)
            again = [read([i]) for i in picked]
        except Exception as error:  # the user's code: whatever it raises is the reason
            raise Unsupported("an item cannot be read alone", repr(error)) from error
        drawn = draws.happened()
    if drawn:
        raise _refusal("reading an item draws random numbers (an augmentation?)")
    if not all(map(same, once, again)):
        raise _refusal("two reads of one item differ (an augmentation?)")
    return seconds


def build(
    loader: DataLoader[Any],
    *,
    device: torch.device,
    limit_bytes: int,
    limit_s: float,
) -> TensorStore:
    """Read the whole dataset into tensors, and prove the batches made of them.

    Raises:
        Unsupported: It cannot be held, with the reason; or it was held and a batch was not the same.
    """
    require_plain(loader)
    known = not why_not_now(loader)
    seconds = 0.0 if known else require_deterministic(loader) * _length(loader.dataset)
    if seconds > limit_s:
        raise _refusal(f"reading all items takes about {seconds:.0f} s (limit {limit_s:g} s)")
    read = Rows(loader.dataset).take if known else reader(loader)
    store = _filled(loader, read, device, limit_bytes)
    prove(store, loader, count=_PROOFS)
    return store


def prove(
    store: TensorStore, loader: DataLoader[Any], *, count: int, seed: int = 0, size: int = 0
) -> None:
    """Compare batches with those of the user's dataset: the first, the last and `count` at random.

    Raises:
        Unsupported: They differ in a bit, a stride, a dtype or their structure.
    """
    read, total = reader(loader), store.num_items
    size = min(total, size or batch_size_of(loader))
    choice = Random(seed)
    lists = [choice.sample(range(total), size) for _ in range(count)]
    if not seed:
        lists += [list(range(size)), list(range(total - size, total)), [total - 1]]
    with preserve_rng(loader.dataset, loader.collate_fn):
        for indices in lists:
            given = read(indices)
            if not same(_on_cpu(given), _on_cpu(store.take(indices))):
                raise _refusal("batches differ from those of the dataset, read item by item")


def batch_leaves(batch: Any) -> tuple[list[Tensor], TreeSpec]:
    """Return the tensors of a batch.

    Raises:
        Unsupported: Something else is in it, or tensors that are no rows of plain numbers.
    """
    leaves, spec = tree_flatten(batch)
    if not leaves:
        raise _refusal("a batch without tensors")
    for leaf in leaves:
        if type(leaf) is not Tensor or leaf.layout != torch.strided or leaf.is_quantized:
            raise _refusal(f"a {type(leaf).__name__} in a batch, where plain tensors are needed")
        if leaf.requires_grad or leaf.is_conj() or leaf.is_neg():
            raise _refusal("a tensor in a batch that is not plain numbers (gradients, views)")
    return leaves, spec


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Return the number of items of a batch, on average where the sampler has its own idea of it."""
    named = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(named, int) and named > 0:
        return named
    return max(1, _length(loader.dataset) // max(1, _length(loader.batch_sampler)))


def _filled(
    loader: DataLoader[Any], read: Callable[[Any], Any], device: torch.device, limit_bytes: int
) -> TensorStore:
    total, size = _length(loader.dataset), batch_size_of(loader)
    trusted = loader.collate_fn is default_collate and _reads_singly(loader.dataset)
    with preserve_rng(loader.dataset, loader.collate_fn):
        draws = Draws(loader.dataset, loader.collate_fn)
        start = list(range(min(size, total)))
        leaves, spec = batch_leaves(read(start))
        _require_rows(leaves, len(start))
        needed = sum(leaf.nbytes for leaf in leaves) * total // len(start)
        if needed > limit_bytes:
            raise too_large(needed, limit_bytes)
        dims = tuple(_dims(leaf) for leaf in leaves)
        held = tuple(
            torch.empty((total, *leaf.permute(d).shape[1:]), dtype=leaf.dtype, device=device)
            for leaf, d in zip(leaves, dims, strict=True)
        )
        for first in range(0, total, size):
            chunk = list(range(first, min(first + size, total)))
            _fill(held, dims, spec, chunk, read, trusted=trusted)
        if draws.happened():
            raise _refusal("reading the items draws random numbers (an augmentation?)")
    return TensorStore(held, dims, spec, total)


def _fill(
    held: tuple[Tensor, ...],
    dims: tuple[tuple[int, ...], ...],
    spec: TreeSpec,
    chunk: list[int],
    read: Callable[[Any], Any],
    *,
    trusted: bool,
) -> None:
    try:
        parts = [read(chunk)] if trusted else [read(chunk), *(read([i]) for i in chunk)]
    except Exception as error:  # the user's code: whatever it raises is the reason
        raise _refusal(f"items {chunk[0]} to {chunk[-1]} cannot be stacked: {error!r}") from error
    places = [slice(chunk[0], chunk[-1] + 1), *(slice(i, i + 1) for i in chunk)]
    for turn, (part, place) in enumerate(zip(parts, places, strict=False)):
        leaves, other = batch_leaves(part)
        if other != spec:
            raise _refusal("batches differ in their structure")
        for leaf, rows, d in zip(leaves, held, dims, strict=True):
            wanted = rows[place]
            if leaf.dim() != len(d) or leaf.permute(d).shape != wanted.shape:
                raise _refusal(f"items differ in shape (item {place.start})")
            if leaf.dtype != rows.dtype:
                raise _refusal(f"items differ in dtype (item {place.start})")
            if turn == 0:
                wanted.copy_(leaf.permute(d))
            elif not same(wanted.cpu().contiguous(), leaf.permute(d).cpu().contiguous()):
                raise _refusal("a batch is more than its items stacked (a collate_fn that mixes?)")


def _dims(leaf: Tensor) -> tuple[int, ...]:
    """Return the dimensions of a batch from the outermost in memory to the innermost."""
    strides = leaf.stride()
    inner = sorted(range(1, leaf.dim()), key=lambda d: (-strides[d], d))
    return (0, *inner)


def _in_batch(taken: Tensor, dims: tuple[int, ...]) -> Tensor:
    if dims == tuple(range(len(dims))):
        return taken
    return taken.permute([dims.index(d) for d in range(len(dims))])


def _require_rows(leaves: list[Tensor], size: int) -> None:
    for leaf in leaves:
        if leaf.dim() < 1 or len(leaf) != size:
            raise _refusal(f"a tensor of shape {tuple(leaf.shape)} in a batch of {size} items")


def _reads_singly(dataset: Dataset[Any]) -> bool:
    """Whether a dataset gives items one by one, whatever else is in the batch."""
    if type(dataset) is Subset:
        return _reads_singly(dataset.dataset)
    if type(dataset) is StackDataset:
        parts = (
            dataset.datasets.values() if isinstance(dataset.datasets, dict) else dataset.datasets
        )
        return all(map(_reads_singly, parts))
    return not getattr(dataset, "__getitems__", None)


def _known_start(start: Any) -> bool:
    """Whether workers are started with nothing, or with what Lightning adds to seed them."""
    inner = getattr(start, "func", start)
    name = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__name__', '')}"
    return start is None or (
        name.startswith("lightning.fabric.") and name.endswith("pl_worker_init_function")
    )


def _length(sized: Any) -> int:
    try:
        return len(sized)
    except Exception:  # the user's code: whatever it raises, there is no length
        return -1


def _on_cpu(batch: Any) -> Any:
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([x.cpu() if isinstance(x, Tensor) else x for x in leaves], spec)


def _refusal(found: str) -> Unsupported:
    return Unsupported("this dataset cannot be held in memory as it is", found, "leave it as it is")


def too_large(needed: int, limit: int) -> Unsupported:
    """Return the error that says how much room is needed."""
    return Unsupported(
        "this dataset is too large to be held in memory",
        f"{needed / 1e6:.1f} MB, where {limit / 1e6:.1f} MB are allowed",
        "pass a larger `limit_bytes` if there is room",
    )
