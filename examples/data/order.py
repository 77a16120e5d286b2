"""The order of training samples as a pure function of seed and epoch."""

from __future__ import annotations

import torch
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset


def in_order(dataset: TensorDataset, batch_size: int, num_workers: int) -> DataLoader:
    """Load in the order of the dataset, without a shuffle."""
    return DataLoader(dataset, batch_size, num_workers=num_workers, generator=torch.Generator())


def shuffled(dataset: TensorDataset, batch_size: int, num_workers: int, seed: int) -> DataLoader:
    """Load in an order that depends on `seed` and epoch alone, so that a resumed fit repeats it.

    Lightning calls `set_epoch` of the sampler. The loader's own generator keeps it from drawing from
    the global one. On DDP each process reads its own share.
    """
    shared = distributed.is_available() and distributed.is_initialized()
    order: DistributedSampler = DistributedSampler(
        dataset,
        num_replicas=distributed.get_world_size() if shared else 1,
        rank=distributed.get_rank() if shared else 0,
        seed=seed,
    )
    return DataLoader(
        dataset,
        batch_size,
        sampler=order,
        num_workers=num_workers,
        drop_last=True,
        generator=torch.Generator(),
    )
