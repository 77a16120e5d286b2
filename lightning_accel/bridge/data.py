"""The batches that a fit will be given, read without the fit missing or noticing anything.

A loader of indices is asked through a copy of its sampler, so only what the fit trains on is ever read,
and read as torch's own fetcher reads. Any other loader is copied whole. What cannot be copied, such as a
generator or a socket, would lose the batches that somebody else reads: it is left alone, and who asks gets
`ReadOnce`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from torch.utils.data._utils.fetch import _MapDatasetFetcher
from torch.utils.data.dataloader import _DatasetKind

from lightning_accel.errors import AccelError
from lightning_accel.surgery.preserve import (
    CannotPreserve,
    generators,
    is_iterator,
    preserve_rng,
    preserve_state,
    reachable,
    runs,
)
from lightning_accel.surgery.rng import seed_rng

_SEED = 0
_LOOK_AHEAD = 4096
"""Batches of indices among which the ones to read are chosen."""
_LARGE_BYTES = 2**20


class ReadOnce(AccelError):
    """The training data can be read only once, and that belongs to the fit."""


def batches(trainer: Trainer, count: int) -> list[Any]:
    """Return up to `count` batches of those that this fit is given, at least one.

    They are spread over what a pass holds, within `limit_train_batches`, and are always the same for
    samplers without state of their own: a resumed run then decides as the uninterrupted one.

    Raises:
        ReadOnce: Reading would take the batches away from the fit.
        AccelError: There is no data.
    """
    loaders = trainer.train_dataloader
    if loaders is None:
        raise AccelError("there is no training data yet", "", "call this within `trainer.fit`")
    limit = trainer.num_training_batches
    limit = _LOOK_AHEAD if not 0 < limit < math.inf else min(int(limit), _LOOK_AHEAD)
    epoch = trainer.current_epoch
    drawn = tree_map(lambda loader: _Drawn(_draw(_users(loader), count, limit, epoch)), loaders)
    columns = min(len(v) for v in tree_leaves(drawn, is_leaf=_is_drawn))
    return [tree_map(lambda v, i=i: v[i], drawn, is_leaf=_is_drawn) for i in range(columns)]


def validation_batches(trainer: Trainer, count: int) -> list[tuple[Any, int]]:
    """Return up to `count` batches of each validation loader of this fit, with the loader's number.

    None before Lightning has made the loaders, and of loaders that are read side by side.

    Raises:
        ReadOnce: Reading would take the batches away from the fit.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    if trainer.val_dataloaders is None or not loop._is_sequential:
        return []
    return evaluation_batches(trainer, loop, count)


def evaluation_batches(trainer: Trainer, loop: Any, count: int) -> list[tuple[Any, int]]:
    """Return up to `count` batches of each loader of a loop that evaluates or predicts, with the loader's number.

    Raises:
        ReadOnce: Reading would take the batches away from the run.
    """
    if loop._combined_loader is None or loop._combined_loader._mode != "sequential":
        return []
    limits = getattr(loop, "_max_batches", loop.max_batches)  # those of the sanity check are fewer
    found = []
    for number, loader in enumerate(loop._combined_loader.flattened):
        if (limit := limits[number]) > 0:
            limit = int(min(limit, _LOOK_AHEAD))
            drawn = _draw(_users(loader), count, limit, trainer.current_epoch)
            found += [(batch, number) for batch in drawn]
    return found


def is_stream(trainer: Trainer) -> bool:
    """Tell whether the training data have no indices to ask for, and so perhaps an end."""
    return not all(_reads_by_index(_users(o)) for o in tree_leaves(trainer.train_dataloader))


@contextmanager
def unread(*sources: Any) -> Iterator[None]:
    """Leave loaders, samplers and datasets as they were, whatever reads them meanwhile.

    Raises:
        ReadOnce: Reading would use them up.
    """
    try:
        with preserve_state(*sources):
            yield
    except CannotPreserve as error:
        raise _read_once(sources[0], error) from error


class _Drawn(list[Any]):
    """Batches of one loader, a leaf to tree functions."""


def _is_drawn(value: Any) -> bool:
    return isinstance(value, _Drawn)


def _draw(loader: Any, count: int, limit: int, epoch: int) -> list[Any]:
    """Return batches of one loader."""
    if _reads_by_index(loader):
        found = _by_index(loader, count, limit, epoch)
    elif _has_workers(loader):
        found = _by_workers(loader, {}, min(count, limit))
    else:
        with preserve_rng():
            seed_rng(_SEED)
            other = _copied(loader)
            _set_sampler_epoch(other, epoch)  # as the fit's is told: some have none before
            found = list(islice(other, min(count, limit)))
    if not found:
        raise AccelError("the training data is empty", repr(loader), "pass data to `trainer.fit`")
    return found


def _users(loader: Any) -> Any:
    """Return the user's own loader, where another of ours makes its batches."""
    where = getattr(type(loader), "makes_the_batches_of", None)
    return vars(loader)[where] if where else loader


def _reads_by_index(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ is DataLoader.__iter__
        and loader._dataset_kind == _DatasetKind.Map
    )


def _has_workers(loader: Any) -> bool:
    plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    return plain and loader.num_workers > 0


def _by_index(loader: Any, count: int, limit: int, epoch: int) -> list[Any]:
    dataset = loader.dataset
    name = "batch_sampler" if loader._auto_collation else "sampler"
    with preserve_rng():
        seed_rng(_SEED)
        indices = _copied(loader._index_sampler, dataset)
        _set_sampler_epoch(SimpleNamespace(**{name: indices}), epoch)
        chosen = _spread(list(islice(indices, limit)), count)
    if loader.worker_init_fn is not None and loader.num_workers > 0:
        return _by_workers(loader, {name: chosen}, len(chosen))
    reason = _cannot_be_copied(dataset)
    if reason is not None:
        raise _read_once(dataset, reason)
    fetcher = _MapDatasetFetcher(
        dataset, loader._auto_collation, loader.collate_fn, loader.drop_last
    )
    try:
        with preserve_state(dataset, loader.collate_fn):
            seed_rng(_SEED)
            return [fetcher.fetch(index) for index in chosen]
    except CannotPreserve as error:
        raise _read_once(dataset, error) from error


def _by_workers(loader: Any, changes: dict[str, Any], count: int) -> list[Any]:
    """Let processes read, as the fit does: what they change stays with them."""
    other = copy.copy(loader)
    vars(other).update({"_iterator": None, "persistent_workers": False, **changes})
    with preserve_rng(loader):
        seed_rng(_SEED)
        iterator = iter(other)
        try:
            return list(islice(iterator, count))
        finally:
            del iterator


def _spread(indices: list[Any], count: int) -> list[Any]:
    """Return up to `count` entries evenly; those that are as long as the first, where there are such."""
    sizes = [len(i) if isinstance(i, (list, tuple)) else -1 for i in indices]
    equal = [i for i, size in zip(indices, sizes, strict=True) if size == sizes[0]]
    if len(equal) <= count:
        return equal
    return [equal[i * len(equal) // count] for i in range(count)]


def _copied(source: Any, *shared: Any) -> Any:
    """Return a copy of a loader or sampler, which begins with the same seed each time."""
    reason = _cannot_be_copied(source)
    if reason is not None:
        raise _read_once(source, reason)
    memo: dict[int, Any] = {id(value): value for value in shared}
    for value in reachable(source):
        if isinstance(value, nn.Module) or _is_large(value) or runs(value):
            memo[id(value)] = value
    try:
        made = copy.deepcopy(source, memo)
    except Exception as error:  # whatever the objects of a user do when they are copied
        raise _read_once(source, error) from error
    own = {id(value) for value in reachable(source)}
    for generator in generators(made):
        if id(generator) not in own:  # a dataset is shared with the user's sampler
            _reseed(generator)
    return made


def _cannot_be_copied(source: Any) -> str | None:
    """Return what a deep copy would go on sharing with the original, if anything is used up by reading."""
    for value in reachable(source):
        if isinstance(value, FunctionType):
            held = [c.cell_contents for c in value.__closure__ or ()]
            held += [value.__globals__.get(name) for name in value.__code__.co_names]
        else:
            held = [v for base in type(value).__mro__[:-1] for v in vars(base).values()]
            for name in ("__iter__", "__next__", "__getitem__"):
                code = getattr(getattr(type(value), name, None), "__code__", None)
                world = getattr(getattr(type(value), name, None), "__globals__", {})
                held += [world.get(n) for n in code.co_names] if code is not None else []
        for item in held:
            if is_iterator(item) and not isinstance(item, type):
                return f"an iterator that copies share: {type(item).__name__}"
    return None


def _is_large(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() > _LARGE_BYTES
    return isinstance(value, np.ndarray) and value.nbytes > _LARGE_BYTES


def _reseed(generator: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(_SEED)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(_SEED).state
    else:
        generator.seed(_SEED)


def _read_once(loader: Any, why: object) -> ReadOnce:
    return ReadOnce(
        "the training data can be read only once, so nothing but the fit may read it",
        f"{type(loader).__name__}: {why}",
        "pass `example=` where it is an argument, or let `__iter__` begin anew each time",
    )
