"""What an edit did: a list for people, and a map from each old parameter to its successor.

Every editing verb returns a `Receipt`. Optimizers, weight averages and gradients follow the edit by
reading `moved`, so that nothing of a user's training state goes stale.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Kept(NamedTuple):
    """Which elements of one tensor stay.

    `dims` has one entry per dimension: the kept positions, or `None` where all stay. When the kept
    elements are no product of per-dimension choices (grouped convolutions), `flat` holds their flat
    positions instead, in the shape of the new tensor.
    """

    dims: tuple[Tensor | None, ...]
    flat: Tensor | None = None

    def take(self, tensor: Tensor) -> Tensor:
        """Return a new tensor with the kept elements of `tensor`, on its device and memory format.

        >>> Kept((torch.tensor([0, 2]), None)).take(torch.arange(6).view(3, 2))
        tensor([[0, 1],
                [4, 5]])
        """
        if self.flat is not None:
            taken = tensor.detach().reshape(-1)[self.flat.to(tensor.device)]
        else:
            taken = tensor.detach()
            for dim, positions in enumerate(self.dims):
                if positions is not None:
                    taken = taken.index_select(dim, positions.to(tensor.device))
            taken = taken.clone() if taken.data_ptr() == tensor.data_ptr() else taken
        return _in_format_of(tensor, taken)

    @classmethod
    def from_flat(cls, flat: Tensor, old_shape: tuple[int, ...]) -> Kept:
        """Read a map of flat positions, per dimension where that loses nothing.

        >>> Kept.from_flat(torch.tensor([[0, 1], [4, 5]]), (3, 2)).dims
        (tensor([0, 2]), None)
        """
        dims = []
        rebuilt = torch.zeros((), dtype=torch.long)
        for dim, old in enumerate(old_shape):
            stride = prod(old_shape[dim + 1 :])
            line = flat[tuple(slice(None) if d == dim else 0 for d in range(flat.dim()))]
            positions = line.div(stride, rounding_mode="floor") % old
            rebuilt = rebuilt + (positions * stride).view(
                [-1 if d == dim else 1 for d in range(flat.dim())]
            )
            dims.append(None if torch.equal(positions, torch.arange(old)) else positions)
        if torch.equal(rebuilt.expand(flat.shape), flat):
            return cls(tuple(dims))
        return cls((None,) * flat.dim(), flat)


class Change(NamedTuple):
    """One row of a receipt: module or parameter, what happened to it, and before and after."""

    name: str
    what: str
    before: str = ""
    after: str = ""


class Moved(NamedTuple):
    """One parameter that changed: `new is old` where the object could be kept."""

    name: str
    old: nn.Parameter
    new: nn.Parameter
    old_shape: tuple[int, ...]
    kept: Kept


@dataclass(frozen=True)
class Receipt:
    """What an edit did. Falsy when nothing happened; `+` joins two edits of one model.

    `skipped` names what was asked for and left alone, with the reason; `notes` says what was reached of
    what was asked.

    >>> bool(Receipt()), len((Receipt((Change("fc", "pruned", "8", "4"),)) + Receipt()).changes)
    (False, 1)
    """

    changes: tuple[Change, ...] = ()
    moved: tuple[Moved, ...] = ()
    skipped: tuple[Change, ...] = field(default=())
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes or self.moved)

    def __add__(self, other: Receipt) -> Receipt:
        return Receipt(
            self.changes + other.changes,
            self.moved + other.moved,
            self.skipped + other.skipped,
            self.notes + other.notes,
        )


def _in_format_of(like: Tensor, tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(like.dim()) if tensor.dim() == like.dim() else None
    if wanted and not like.is_contiguous() and like.is_contiguous(memory_format=wanted):
        return tensor.contiguous(memory_format=wanted)
    return tensor.contiguous()
