"""Tensors kept beside a model, one per parameter: slow weights, moving averages, anchors.

People keep them as a dict by name, by parameter or by its id, or as a list in the order of the parameters.
Each belongs to a parameter whose shape it has; when that is cut, it is cut alike. Tensor objects stay the
same, so that whoever else holds one follows along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.surgery.receipt import Kept


class Shadow(NamedTuple):
    """A tensor that belongs to a parameter or buffer, and where it is kept."""

    where: str
    tensor: Tensor
    name: str


class Shadows:
    """Everything of that kind in what some objects hold.

    Args:
        model: Whose parameters are meant.
        holders: Names and attributes of who may hold such tensors.
        orders: Further orders of parameters, such as those of an optimizer's groups.

    >>> net = nn.Linear(2, 3)
    >>> ema = {"ema": {name: p.detach().clone() for name, p in net.named_parameters()}}
    >>> [shadow.name for shadow in Shadows(net, {"callback": ema})]
    ['weight', 'bias']
    """

    def __init__(
        self,
        model: nn.Module,
        holders: Mapping[str, Mapping[str, Any]],
        orders: Iterable[Sequence[nn.Parameter]] = (),
    ) -> None:
        self._tensors: dict[str, Tensor] = dict(model.named_parameters())
        self._tensors |= dict(model.named_buffers())
        self._names = {id(t): name for name, t in self._tensors.items()}
        self._orders = [[self._names.get(id(p), "") for p in order] for order in orders]
        for module in model.modules():
            every = list(module.parameters())
            for order in (every, [p for p in every if p.requires_grad]):
                names = [self._names.get(id(p), "") for p in order]
                if names and names not in self._orders:
                    self._orders.append(names)
        self._found: dict[int, Shadow] = {}
        self.flat: list[str] = []
        for where, held in holders.items():
            for key, value in held.items():
                self._look(value, f"{where}.{key}", 0)

    def __iter__(self) -> Iterator[Shadow]:
        yield from self._found.values()

    @torch.no_grad()
    def follow(self, kept: Mapping[str, Kept]) -> None:
        """Cut each as its parameter was cut."""
        for shadow in self._found.values():
            if shadow.name in kept:
                shadow.tensor.data = kept[shadow.name].take(shadow.tensor)

    def state_dict(self) -> dict[str, Tensor]:
        return {shadow.where: shadow.tensor for shadow in self._found.values()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for shadow in self._found.values():
            stored = state.get(shadow.where)
            if stored is not None:
                shadow.tensor.data = stored.to(shadow.tensor.device, copy=True)

    def _look(self, value: Any, where: str, depth: int) -> None:
        if isinstance(value, Tensor):
            self._note_flat(value, where)
        elif depth > 4 or isinstance(value, (str, bytes)):
            return
        elif isinstance(value, Mapping):
            self._look_in_dict(value, where, depth)
        elif isinstance(value, (list, tuple)):
            self._look_in_list(value, where, depth)

    def _look_in_dict(self, held: Mapping[Any, Any], where: str, depth: int) -> None:
        by_name = {k: v for k, v in held.items() if isinstance(k, str) and isinstance(v, Tensor)}
        for key, name in self._named(by_name).items():
            self._add(f"{where}[{key!r}]", by_name[key], name)
        for key, value in held.items():
            owner = self._names.get(key if isinstance(key, int) else id(key))
            if owner is not None:
                inner = value.values() if isinstance(value, Mapping) else [value]
                for number, one in enumerate(inner):
                    if isinstance(one, Tensor) and one.shape == self._tensors[owner].shape:
                        self._add(f"{where}[{owner!r}].{number}", one, owner)
            elif not isinstance(value, Tensor):
                self._look(value, f"{where}[{key!r}]", depth + 1)

    def _named(self, held: Mapping[str, Tensor]) -> dict[str, str]:
        """Return the name of each, if there is a place in the model where they all fit."""
        best: dict[str, str] = {}
        places = {n[: -len(k)] for k in list(held)[:8] for n in self._tensors if n.endswith(k)}
        for place in sorted(places, key=len):
            if place and not place.endswith("."):
                continue
            fits = {k: place + k for k in held if place + k in self._tensors}
            fits = {k: n for k, n in fits.items() if held[k].shape == self._tensors[n].shape}
            best = fits if len(fits) > len(best) else best
        for prefix in ("module.", "model.", "pl_module."):
            if not best and held and all(k.startswith(prefix) for k in held):
                short = {k.removeprefix(prefix): v for k, v in held.items()}
                return {prefix + k: n for k, n in self._named(short).items()}
        return best

    def _look_in_list(self, held: Sequence[Any], where: str, depth: int) -> None:
        if not held or not all(isinstance(v, Tensor) for v in held):
            for number, value in enumerate(held[:1000]):
                if isinstance(value, (list, tuple)):  # a list of dicts is a record of what was
                    self._look(value, f"{where}[{number}]", depth + 1)
            return
        shapes = [v.shape for v in held]
        for order in self._orders:
            if len(order) == len(shapes) and all(
                name in self._tensors and self._tensors[name].shape == shape
                for name, shape in zip(order, shapes, strict=True)
            ):
                for number, (value, name) in enumerate(zip(held, order, strict=True)):
                    self._add(f"{where}[{number}]", value, name)
                return

    def _add(self, where: str, tensor: Tensor, name: str) -> None:
        own = id(tensor) in self._names or tensor.grad_fn is not None
        own = own or not (tensor.is_floating_point() or tensor.is_complex())
        shared = tensor.dim() and self._tensors[name].data_ptr() == tensor.data_ptr()
        if not own and not shared:
            self._found.setdefault(id(tensor), Shadow(where, tensor, name))

    def _note_flat(self, value: Tensor, where: str) -> None:
        if value.dim() != 1 or id(value) in self._names:
            return
        for order in self._orders:
            known = [self._tensors[name] for name in order if name in self._tensors]
            if len(known) > 1 and sum(p.numel() for p in known) == value.numel():
                self.flat.append(where)
                return
