"""Rows and counts of all processes that train together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from lightning_accel.errors import AccelError
from lightning_accel.surgery.call import tensors

_counts: list[int] = []


@contextmanager
def among(count: int) -> Iterator[None]:
    """Let only as many processes count as a Trainer has: one of a group may train by itself.

    >>> with among(1):
    ...     num_processes()
    1
    """
    _counts.append(count)
    try:
        yield
    finally:
        _counts.pop()


def num_processes() -> int:
    """Return how many processes average their gradients.

    >>> num_processes()
    1
    """
    if _counts and _counts[-1] == 1:
        return 1
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def all_rows(value: Tensor) -> Tensor:
    """Return the rows of all processes, in order of rank; only one's own carry a gradient.

    Raises:
        AccelError: Rows differ in shape between processes.

    >>> all_rows(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if num_processes() == 1:
        return value
    if value.dtype == torch.bool:
        return all_rows(value.byte()).bool()
    own = torch.tensor(value.shape, device=value.device)
    shapes = [torch.empty_like(own) for _ in range(num_processes())]
    distributed.all_gather(shapes, own)
    sizes = [shape.tolist() for shape in shapes]
    if any(size[1:] != sizes[0][1:] for size in sizes):
        raise AccelError(
            "a loss over all rows of a batch needs rows of one shape on all processes",
            f"shapes {sizes}",
            "pad to one length, or use a loss of single rows such as 'kd'",
        )
    most = max(size[0] for size in sizes)  # of a last batch, processes may have different shares
    padded = value.detach().new_zeros((most, *value.shape[1:]))
    padded[: len(value)] = value.detach()
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded)
    rows = [part[: size[0]] for part, size in zip(gathered, sizes, strict=True)]
    rows[distributed.get_rank()] = value
    return torch.cat(rows)


def any_of_all(here: bool, beside: Any) -> bool:
    """Tell whether something is so in any process.

    Args:
        here: In this one.
        beside: What lies on the device that the processes talk through.

    >>> any_of_all(True, torch.ones(1))
    True
    """
    if num_processes() == 1:
        return here
    device = next(tensor.device for tensor in tensors(beside))
    found = torch.tensor(float(here), device=device)
    distributed.all_reduce(found)
    return bool(found > 0)


def share_of_all(mask: Tensor) -> Tensor:
    """Return the factor that turns a mean over valid positions here into one over those everywhere.

    >>> share_of_all(torch.tensor([True, False]))
    tensor(1.)
    """
    own = mask.sum().float()
    everywhere = own.clone()
    if num_processes() > 1:
        distributed.all_reduce(everywhere)
    return torch.where(everywhere > 0, own * num_processes() / everywhere.clamp(min=1), 1.0)


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Average gradients over all processes, in place; one that is missing only here counts as zero."""
    if num_processes() == 1 or not parameters:
        return
    own = [p.grad is not None for p in parameters]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([part.reshape(-1) for part in parts])
    flat = torch.cat([flat, flat.new_tensor(own)])
    distributed.all_reduce(flat)
    sums, found = flat.split([len(flat) - len(own), len(own)])
    sizes = [p.numel() for p in parameters]
    anywhere = found.tolist()
    for parameter, total, some in zip(parameters, sums.split(sizes), anywhere, strict=True):
        parameter.grad = (total / num_processes()).view_as(parameter) if some else None
