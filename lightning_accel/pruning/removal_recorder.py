"""What a pruning function takes of a twin, read off as places in tensors.

While a group is cut, its tensors hold the numbers of their own elements instead of their values; so whatever
functions it is pruned with, those of the user included, the numbers that are left say what was kept. Then the values
come back, for the next choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.exact import widest
from lightning_accel.surgery import Kept, Structure
from lightning_accel.surgery.attributes import Size
from lightning_accel.surgery.structure import named_tensors


class Removal(NamedTuple):
    """What one group of a pruner takes.

    `places` are those that go, by tensor and dimension, counted before anything went; `sizes` is what
    the integer attributes of modules changed by.
    """

    name: str
    places: dict[str, dict[int, Tensor]]
    sizes: dict[str, dict[str, Size]]


class Failed(Exception):
    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name)
        self.name, self.reason = name, reason


class RemovalRecorder:
    """Sees what each group takes of a twin.

    `_places` holds by tensor and dimension which of the first places is now at each place.
    """

    def __init__(self, model: nn.Module, made: Any) -> None:
        self._model = model
        self._graph = made.DG
        self._names = {id(module): name for name, module in model.named_modules()}
        self._places = {
            name: [torch.arange(size) for size in tensor.shape]
            for name, tensor in named_tensors(model)
        }
        self.found: list[Removal] = []

    def prune(self, group: Any, failed: Mapping[str, str]) -> None:
        """Let a group be pruned, and note what it takes; leave it alone if it has failed before."""
        name = self._name(group)
        if name in failed:
            return
        sizes = Structure.of(self._model).attributes
        before = dict(named_tensors(self._model))
        values, gradients = self._number(self._touched(group))
        try:
            group.prune()
        except Exception as error:  # whatever a pruning function may raise
            raise Failed(
                name, f"torch-pruning fails to cut it: {type(error).__name__}: {error}"
            ) from error
        places = self._read(name, before, values, gradients)
        now = Structure.of(self._model).attributes
        changes = {
            module: {k: _minus(v, before[k]) for k, v in now[module].items() if v != before.get(k)}
            for module, before in sizes.items()
            if now.get(module) != before
        }
        self.found.append(Removal(name, places, changes))

    def _name(self, group: Any) -> str:
        root = group[0].dep.target.module
        if isinstance(root, nn.Parameter):
            return str(self._graph._param_to_name[root])
        return self._names.get(id(root), type(root).__name__)

    def _touched(self, group: Any) -> dict[str, Tensor]:
        """Return the tensors of what a group names: numbering all of a network for each would take long."""
        mine: set[int] = set()
        for dep, _ in group:
            target = dep.target.module
            if isinstance(target, nn.Module):
                mine.update(id(tensor) for _, tensor in named_tensors(target))
            mine.add(id(target))
        return {name: t for name, t in named_tensors(self._model) if id(t) in mine}

    def _number(self, touched: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Put the numbers of their elements into tensors, and return values and gradients."""
        values = {name: tensor.data for name, tensor in touched.items()}
        gradients = {name: t.grad for name, t in touched.items() if t.grad is not None}
        for tensor in touched.values():
            # From their count on, so that a multiple of one is none of another.
            dtype = widest(tensor.device)
            numbers = torch.arange(tensor.numel(), dtype=dtype, device=tensor.device)
            numbers += tensor.numel()
            tensor.grad = None
            tensor.data = numbers.view(tensor.shape)
        return values, gradients

    def _read(
        self,
        name: str,
        before: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
    ) -> dict[str, dict[int, Tensor]]:
        now = dict(named_tensors(self._model))
        others = {key for key in {*before, *now} if key not in values}
        odd = [key for key in others if now.get(key) is not before.get(key)]
        odd += [key for key in values if key not in now]
        if odd:
            raise Failed(name, f"torch-pruning puts another tensor in place of `{odd[0]}`")
        tensors = {key: now[key] for key in values}
        places: dict[str, dict[int, Tensor]] = {}
        kept = {key: self._kept(name, key, t, values[key]) for key, t in tensors.items()}
        for key, tensor in tensors.items():
            flat = kept[key]
            tensor.data = values[key].reshape(-1)[flat].contiguous()
            if key in gradients:
                tensor.grad = gradients[key].reshape(-1)[flat].contiguous()
            gone = self._gone(name, key, flat.cpu(), tuple(values[key].shape))
            if gone:
                places[key] = gone
        return places

    def _kept(self, name: str, key: str, tensor: Tensor, value: Tensor) -> Tensor:
        """Return which elements are left of a tensor, in the shape of what is left."""
        numbers = tensor.data
        flat = numbers.long() - value.numel()
        exact = 2**24 if numbers.dtype == torch.float32 else 2**53
        whole = numbers.dtype in (torch.float32, torch.float64) and 2 * value.numel() < exact
        whole = whole and bool((flat + value.numel() == numbers).all())
        if not whole or (
            flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < value.numel()
        ):
            raise Failed(name, f"its pruning function does more to `{key}` than to remove")
        return flat

    def _gone(self, name: str, key: str, flat: Tensor, shape: tuple[int, ...]) -> dict[int, Tensor]:
        if tuple(flat.shape) == shape and torch.equal(
            flat.reshape(-1), torch.arange(math.prod(shape))
        ):
            return {}
        kept = Kept.from_flat(flat, shape) if flat.dim() == len(shape) else Kept((), flat)
        if kept.flat is not None:
            raise Failed(name, f"what it takes of `{key}` is no whole channels")
        gone = {}
        for dim, left in enumerate(kept.dims):
            if left is not None:
                before = self._places[key][dim]
                stays = torch.zeros(len(before), dtype=torch.bool)
                stays[left] = True
                if len(left) != int(stays.sum()) or bool((left.diff() < 0).any()):
                    raise Failed(name, f"it puts the channels of `{key}` in another order")
                gone[dim], self._places[key][dim] = before[~stays], before[left]
        return gone


def _minus(now: Size, before: Size) -> Size:
    if isinstance(now, tuple) and isinstance(before, tuple):
        return tuple(a - b for a, b in zip(now, before, strict=True))
    assert isinstance(now, int) and isinstance(before, int)
    return now - before
