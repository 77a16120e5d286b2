"""Rows and counts of all processes that train together."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def num_processes() -> int:
    """Return how many processes average their gradients.

    >>> num_processes()
    1
    """
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def all_rows(value: Tensor) -> Tensor:
    """Return the rows of all processes, in order of rank; only one's own carry a gradient.

    The shape must be the same everywhere, as a `DistributedSampler` makes it.

    >>> all_rows(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """
    if num_processes() == 1:
        return value
    gathered = [torch.empty_like(value) for _ in range(num_processes())]
    distributed.all_gather(gathered, value.detach().contiguous())
    gathered[distributed.get_rank()] = value
    return torch.cat(gathered)


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
    """Average gradients over all processes, in place; a missing one counts as zero."""
    if num_processes() == 1 or not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])  # type: ignore[union-attr]
    distributed.all_reduce(flat)
    flat /= num_processes()
    for parameter, part in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.grad.copy_(part.view_as(parameter))  # type: ignore[union-attr]
