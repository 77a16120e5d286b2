"""What an edit did: a list for people, and a map from each old parameter to its successor.

Every editing verb returns a `Receipt`. Optimizers, weight averages and gradients follow the edit by
reading `moved`, so that nothing of a user's training state goes stale.
"""

from __future__ import annotations

from collections.abc import Sequence
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

    def __repr__(self) -> str:
        """Write the number of kept positions of each dimension, not the positions."""
        dims = ", ".join("all" if d is None else str(len(d)) for d in self.dims)
        return f"Kept({dims})" if self.flat is None else f"Kept({self.flat.numel()} elements)"

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
            taken = taken.clone() if all(p is None for p in self.dims) else taken
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

    def __repr__(self) -> str:
        """Write the shapes, not the values."""
        return f"Moved({self.name!r}, {self.old_shape} -> {tuple(self.new.shape)})"


class Removed(NamedTuple):
    """One parameter that went with its whole block."""

    name: str
    old: nn.Parameter

    def __repr__(self) -> str:
        """Write the shape, not the values."""
        return f"Removed({self.name!r}, {tuple(self.old.shape)})"


@dataclass(frozen=True)
class Receipt:
    """What an edit did. Falsy when nothing happened; `+` joins two edits of one model.

    `removed` are parameters that are gone for good, with whole blocks. `skipped` names what was asked for and left alone, with the reason; `notes` says what was reached of
    what was asked.

    >>> bool(Receipt()), len((Receipt((Change("fc", "pruned", "8", "4"),)) + Receipt()).changes)
    (False, 1)
    """

    changes: tuple[Change, ...] = ()
    moved: tuple[Moved, ...] = ()
    skipped: tuple[Change, ...] = field(default=())
    notes: tuple[str, ...] = ()
    removed: tuple[Removed, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.changes or self.moved)

    def __repr__(self) -> str:
        """Write a summary of at most ten lines, without tensors.

        >>> Receipt((Change("fc", "pruned", "8", "4"),))
        Receipt(1 changes, 0 moved, 0 skipped, 0 notes)
          fc: pruned, 8 -> 4
        """
        counts = ", ".join(
            f"{len(getattr(self, f))} {f}" for f in ("changes", "moved", "skipped", "notes")
        )
        lines = [f"  {c.name}: {c.what}, {c.before} -> {c.after}" for c in self.changes]
        lines += [f"  left alone: {c.name}: {c.what}" for c in self.skipped]
        return summary(f"Receipt({counts})", [*lines, *(f"  {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """Show it in a notebook: every change, and what was left alone.

        >>> Receipt((Change("fc", "pruned", "8", "4"),))._repr_html_().count("<tr>")
        2
        """
        from lightning_accel.measure.table import Table  # above this file, which it imports

        rows = [[c.name, c.what, c.before, c.after] for c in self.changes]
        rows += [[c.name, f"left alone: {c.what}", c.before, c.after] for c in self.skipped]
        title = f"{len(self.changes)} changes, {len(self.skipped)} left alone"
        return Table(["", "what", "before", "after"], rows, title, self.notes).to_html()

    def __add__(self, other: Receipt) -> Receipt:
        return Receipt(
            self.changes + other.changes,
            self.moved + other.moved,
            self.skipped + other.skipped,
            self.notes + other.notes,
            self.removed + other.removed,
        )


def summary(title: str, lines: Sequence[str]) -> str:
    """Write at most ten lines, each of at most 110 characters.

    >>> summary("twelve", [str(n) for n in range(12)]).splitlines()[-2:]
    ['6', '  and 5 more']
    """
    shown = lines if len(lines) <= 8 else [*lines[:7], f"  and {len(lines) - 7} more"]
    flat = [line.replace("\n", " ") for line in (title, *shown)]
    return "\n".join(line if len(line) <= 110 else f"{line[:107]}..." for line in flat)


def _in_format_of(like: Tensor, tensor: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(like.dim()) if tensor.dim() == like.dim() else None
    if wanted and not like.is_contiguous() and like.is_contiguous(memory_format=wanted):
        return tensor.contiguous(memory_format=wanted)
    return tensor.contiguous()
