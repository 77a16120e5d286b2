"""A step that talks to other processes cannot run on one of them alone: the others do not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_accel.errors import Unsupported

_COLLECTIVES = (
    "all_gather",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "monitored_barrier",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "scatter",
    "scatter_object_list",
    "send",
)


@contextmanager
def forbid_collectives(world_size: int) -> Iterator[None]:
    """Let collectives raise instead of waiting for processes that are not in them.

    Raises:
        Unsupported: Within, where a step calls one.

    >>> with forbid_collectives(1):
    ...     pass
    """
    names = [n for n in _COLLECTIVES if world_size > 1 and hasattr(torch.distributed, n)]
    before = {name: getattr(torch.distributed, name) for name in names}
    for name in names:
        setattr(torch.distributed, name, _refusing(name))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch.distributed, name, function)


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise Unsupported(
            "a step that talks to other processes cannot be measured on one alone",
            f"torch.distributed.{name} in the training step",
            "use a preset that `lightning-accel tune` wrote on one device",
        )

    return refuse
