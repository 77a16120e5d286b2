"""Importances of torch-pruning, and of whoever wrote one for it, on our groups.

torch-pruning hands an importance the items of a group: a layer, the function that would prune it, and
which channels. The same is made here from our members, for groups in which each channel is one place of
some tensor (not for heads, whose places torch-pruning numbers by itself).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.pruning.groups import Group, Member

_GATHERED = "_accel_gathered"


class _Target(NamedTuple):
    module: Any


class _Dependency(NamedTuple):
    """What torch-pruning's importances read of a dependency."""

    layer: Any
    pruning_fn: Any

    @property
    def target(self) -> _Target:
        return _Target(self.layer)

    @property
    def handler(self) -> Any:
        return self.pruning_fn


class _Item:
    """A dependency with its places, and the unit of each; unpacks into the first two."""

    def __init__(self, dep: _Dependency, positions: Tensor) -> None:
        self.dep = dep
        self.idxs = positions.reshape(-1).tolist()
        units, places = positions.shape
        self.root_idxs = [unit for unit in range(units) for _ in range(places)]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.dep, self.idxs))


def is_of_torch_pruning(importance: Any) -> bool:
    """Whether an importance was written for torch-pruning; does not import it.

    >>> is_of_torch_pruning("magnitude")
    False
    """
    return any(base.__module__.startswith("torch_pruning.") for base in type(importance).__mro__)


def by_name(importance: Any, model: nn.Module) -> Any:
    """Return an importance that knows by name what it gathered for parameters of `model`, as Hessians do.

    Every cut is planned on a copy, whose parameters are others.
    """
    if not is_of_torch_pruning(importance):
        return importance
    names = {id(p): name for name, p in model.named_parameters()}
    gathered = {
        key: {names.get(id(p), ""): value for p, value in held.items()}
        for key, held in getattr(importance, "__dict__", {}).items()
        if isinstance(held, dict) and held and all(id(p) in names for p in held)
    }
    if not gathered:
        return importance
    made = copy.copy(importance)
    setattr(made, _GATHERED, gathered)
    return made


def of_copy(importance: Any, model: nn.Module) -> Any:
    """Return an importance that finds what `by_name` noted at the parameters of a copy.

    Raises:
        ValueError: It was gathered before the network was cut.
    """
    gathered = getattr(importance, "__dict__", {}).get(_GATHERED)
    if gathered is None:
        return importance
    made, parameters = copy.copy(importance), dict(model.named_parameters())
    for key, held in gathered.items():
        for name, value in held.items():
            p = parameters[name]
            if isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError("it was gathered before the network was cut: gather it anew")
            if p.grad is None:
                p.grad = torch.zeros_like(p)  # into which torch-pruning writes it
        vars(made)[key] = {parameters[name]: value for name, value in held.items()}
    return made


def score(model: nn.Module, group: Group, importance: Any) -> Tensor:
    """Return what a torch-pruning importance says of each unit, shape (units,).

    Args:
        model: The network, with gradients if the importance reads them.
        group: Channels, each one place of some tensor.
        importance: Such as `torch_pruning.importance.GroupMagnitudeImportance()`.

    Raises:
        ValueError: The group is of another kind, or the importance has nothing to say of it.
    """
    importance = of_copy(importance, model)
    items = sorted(_items(model, group), key=lambda item: len(item.idxs))
    if items and len(items[0].idxs) != group.units:
        raise ValueError(
            "torch-pruning's importances rank channels one by one, not heads or blocks"
        )
    found = importance(items) if items else None
    if found is None:
        raise ValueError(f"{type(importance).__name__} has nothing to say of it")
    return torch.as_tensor(found)


def _items(model: nn.Module, group: Group) -> Iterator[_Item]:
    seen = set()
    for member in group.members:
        layer, verb = _side(model, member)
        if verb is not None and (id(layer), verb) not in seen:
            seen.add((id(layer), verb))
            yield _Item(_Dependency(layer, verb), member.positions)


def _side(model: nn.Module, member: Member) -> tuple[Any, Any]:
    """Return the layer of a member and torch-pruning's function for its side, or no function."""
    from torch_pruning import function

    path, _, leaf = member.tensor.rpartition(".")
    layer = model.get_submodule(path)
    side = "in" if member.role == "in" else "out"
    if isinstance(layer, nn.modules.conv._ConvNd):
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        kind = "depthwise_conv" if depthwise else "conv"
    else:
        kinds = {
            nn.Linear: "linear",
            nn.Embedding: "embedding",
            nn.modules.batchnorm._BatchNorm: "batchnorm",
            nn.LayerNorm: "layernorm",
            nn.GroupNorm: "groupnorm",
            nn.modules.instancenorm._InstanceNorm: "instancenorm",
            nn.PReLU: "prelu",
        }
        kind = next((name for base, name in kinds.items() if isinstance(layer, base)), "")
    if kind:
        return layer, getattr(function, f"prune_{kind}_{side}_channels")
    parameter = layer._parameters.get(leaf)
    return parameter, None if parameter is None else function.prune_parameter_out_channels
