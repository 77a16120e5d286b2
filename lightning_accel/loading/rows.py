"""Batches looked up in the tensors that a dataset consists of, at the moment a DataLoader would read them.

Whatever a dataset of one's own gives may be another at the next read: labels are rewritten, epochs are set,
transforms draw, reads are counted; no look from outside proves the opposite. A `TensorDataset`, and a
`Subset` of one, gives rows of its tensors and nothing else. So nothing is held: each batch is looked up in
the user's own tensors, which sees every write, also those that no version counts (`.data`, `numpy()`).

A DataLoader's workers see the data as it was when they were started. Then so do we: by a copy.
"""

from __future__ import annotations

import multiprocessing
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from lightning_accel.errors import Unsupported

_LISTS = (list, tuple, range, np.ndarray, Tensor)


class Rows(NamedTuple):
    """The look-up of a `TensorDataset`, or of a `Subset` of one.

    >>> Rows(Subset(TensorDataset(torch.arange(6)), [5, 1, 2])).take([0, 2])
    [tensor([5, 2])]
    """

    dataset: Any

    @property
    def copied(self) -> bool:
        """Nothing is."""
        return False

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")

    @property
    def num_bytes(self) -> int:
        """How many bytes the tensors take, which are there in any case."""
        return sum(t.nbytes for t in _whole(self.dataset).tensors)

    def take(self, indices: Any) -> Any:
        """Return the batch of some items, in new memory; `None` where it is more than rows."""
        found = self._places(indices)
        if found is None:
            return None
        places, tensors = found
        picked = torch.tensor(places)
        return [_batch(tensor, picked) for tensor in tensors]

    def frozen(self) -> Rows:
        """Return a look-up in a copy of the data as it is now."""
        whole: TensorDataset = _whole(self.dataset)
        copy: Any = TensorDataset(*(t.clone() for t in whole.tensors))
        for subset in reversed(_subsets(self.dataset)):
            copy = Subset(copy, [*subset.indices])
        return Rows(copy)

    def _places(self, indices: Any) -> tuple[list[int], tuple[Tensor, ...]] | None:
        if type(indices) not in _LISTS:
            return None
        dataset, places = self.dataset, list(indices)
        while True:
            numbers = [number(i) for i in places]
            if not numbers or any(n is None for n in numbers):
                return None
            if type(dataset) is not Subset or type(dataset.indices) not in _LISTS:
                break
            try:
                places = [dataset.indices[n] for n in numbers]  # type: ignore[index]
            except IndexError:
                return None  # the dataset itself says what is wrong with that
            dataset = dataset.dataset
        if why_not_rows(dataset):
            return None
        size = min(len(tensor) for tensor in dataset.tensors)
        wanted = [n for n in numbers if n is not None]
        if max(wanted) >= size or (
            min(wanted) < 0 and any(len(t) != size for t in dataset.tensors)
        ):
            return None
        if min(wanted) < -size:
            return None
        return [n % size for n in wanted], dataset.tensors


def why_not_rows(dataset: Any) -> str:
    """Return why items may be more than rows of tensors, or nothing."""
    while type(dataset) is Subset:
        if type(dataset.indices) not in _LISTS:
            return f"a Subset by a {type(dataset.indices).__name__}"
        dataset = dataset.dataset
    if type(dataset) is not TensorDataset:
        return (
            f"a {type(dataset).__name__}, whose items may change from read to read; if they never do, "
            "pass unchanging=True"
        )
    for tensor in dataset.tensors:
        if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_quantized:
            return f"a TensorDataset of a {type(tensor).__name__} that is not plain"
        if tensor.device.type != "cpu" or tensor.requires_grad or tensor.dim() < 1:
            return "a TensorDataset of tensors with gradients, or that are not on the CPU"
        if tensor.is_conj() or tensor.is_neg():
            return "a TensorDataset of views that conjugate or negate"
    return "" if dataset.tensors else "a TensorDataset without tensors"


def why_not_now(loader: DataLoader[Any]) -> str:
    """Return why a DataLoader gives more than rows of its dataset as it is at some moment, or nothing."""
    if loader.collate_fn is not default_collate:
        return "a `collate_fn`, which may give others at each call; if not, pass unchanging=True"
    found = why_not_rows(loader.dataset)
    if found or not loader.num_workers:
        return found
    context: Any = loader.multiprocessing_context or multiprocessing
    default = multiprocessing.get_all_start_methods()[0]
    if (context.get_start_method(allow_none=True) or default) != "fork":
        return "workers that are not forked, which may see later writes"
    for tensor in _whole(loader.dataset).tensors:
        if tensor.is_shared() or not tensor.is_contiguous():
            return "workers that read tensors in shared memory, or that are not contiguous"
        if loader.persistent_workers and not tensor.untyped_storage().resizable():
            # Memory of others, a file's or an array's, may be shared by all processes.
            return "workers that persist and read tensors in the memory of others"
    return ""


def rows(loader: DataLoader[Any]) -> Rows:
    """Return the look-up that gives a DataLoader's batches.

    Raises:
        Unsupported: It cannot be proved that they are rows of tensors.
    """
    why = why_not_now(loader)
    if why:
        do = "leave it as it is, or vouch that items never change by unchanging=True"
        raise Unsupported("the items of this dataset are not known to stay", why, do)
    return Rows(loader.dataset)


def _subsets(dataset: Any) -> list[Any]:
    found = []
    while type(dataset) is Subset:
        found.append(dataset)
        dataset = dataset.dataset
    return found


def _whole(dataset: Any) -> Any:
    chain = _subsets(dataset)
    return chain[-1].dataset if chain else dataset


def number(index: Any) -> int | None:
    """Return a place, or `None` for what picks something else: a bool, a mask, a tuple, a key."""
    if type(index) is int:
        return index
    if isinstance(index, np.integer):
        return int(index)
    if type(index) is Tensor and index.dim() == 0 and index.dtype in (torch.int64, torch.int32):
        return int(index)
    return None


def _batch(tensor: Tensor, picked: Tensor) -> Tensor:
    taken = tensor.index_select(0, picked)
    if tensor.is_contiguous():
        return taken
    # Rows of another memory format: `stack` chooses that of the batch by that of the items.
    like = torch.stack([tensor[0], tensor[0]])
    strides = like.stride()
    order = sorted(range(1, like.dim()), key=lambda d: (-strides[d], d))
    inner = taken.permute(0, *order).contiguous()
    return inner.permute([(0, *order).index(d) for d in range(like.dim())])
