"""Data are read in the user's order, and by as many readers as the strategy has.

`_process_dataloader` of Lightning 2.6 passes `shuffle=True` for training whatever the user's loader does (its
`data_connector.py`), so "the same script on two devices" would be another order of data. And a `DistributedSampler` that
a user made for all processes would give other batches to those that share a network.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

_METHOD = "_prepare_dataloader"


def keep_order(trainer: Trainer) -> None:
    """Let the loaders of this Trainer that read in order do so on all processes together."""
    connector = trainer._data_connector
    if _METHOD not in vars(connector):
        vars(connector)[_METHOD] = partial(_prepared, trainer, getattr(connector, _METHOD))


def _prepared(trainer: Trainer, prepare: Any, dataloader: Any, shuffle: bool, mode: Any) -> Any:
    sampler = getattr(dataloader, "sampler", None)
    if type(sampler) is DistributedSampler:
        _share_with_readers(sampler, trainer)
    in_order = isinstance(dataloader, DataLoader) and type(sampler) is SequentialSampler
    return prepare(dataloader, shuffle=shuffle and not in_order, mode=mode)


def _share_with_readers(sampler: Any, trainer: Trainer) -> None:
    """Let a sampler that a user made for all processes, as its default is, share data among those that read other data."""
    readers = trainer.distributed_sampler_kwargs
    made_for = sampler.num_replicas, sampler.rank
    for_all = made_for == (trainer.world_size, trainer.global_rank)
    if readers and for_all and readers["num_replicas"] != sampler.num_replicas:
        settings = {n: getattr(sampler, n) for n in ("shuffle", "seed", "drop_last")}
        other: Any = DistributedSampler(sampler.dataset, **readers, **settings)
        vars(sampler).update({**vars(other), "epoch": sampler.epoch})
