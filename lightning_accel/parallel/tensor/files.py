"""Checkpoints of a split module are those of one process: whole tensors, put together name by name."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._pytree import MappingKey, keystr, tree_map, tree_map_with_path

from lightning_accel.parallel.tensor.split import SplitModel
from lightning_accel.surgery.structure import named_tensors

_OPTIMIZERS = "optimizer_states"


def whole_checkpoint(
    checkpoint: dict[str, Any], split: SplitModel, names: Sequence[Mapping[int, str]], *, keep: bool
) -> dict[str, Any]:
    """Return a checkpoint with whole tensors on the host in place of parts; all processes take part.

    A tensor is known by the name that it stands under and by its shape: weights, averages of them that callbacks keep, and
    states of optimizers by the number of their weight.

    Args:
        checkpoint: What Lightning has collected.
        split: How the module is split.
        names: Of each optimizer's parameters, by their numbers in its state.
        keep: Whether this process wants the tensors; the others help, and get `None`.
    """
    shapes = {
        n: tuple(k.take(torch.empty(split.shape(n), device="meta")).shape)
        for n, k in split.kept.items()
    }

    def gathered(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if shapes.get(name) == tuple(full.shape):
            full = split.whole(name, full, host=True)
        return full.detach().cpu() if keep else None

    every = {n for n, _ in named_tensors(split.model)}
    parts = {tuple(split.part(n, torch.empty(split.shape(n), device="meta")).shape) for n in shapes}
    unknown: list[str] = []

    def by_path(path: tuple[Any, ...], value: Any) -> Any:
        keys = [str(k.key) for k in path if isinstance(k, MappingKey)]
        name = _name_in(keys, shapes, every)
        is_part = isinstance(value, Tensor) and value.dim() > 1 and tuple(value.shape) in parts
        if is_part and not name and not (keys and keys[-1] in every):
            unknown.append(keystr(path))
        return gathered(name, value)

    states = [
        {
            **state,
            "state": {
                number: tree_map(partial(gathered, known.get(number, "")), entry)
                for number, entry in state["state"].items()
            },
        }
        for state, known in zip(checkpoint.get(_OPTIMIZERS, ()), names, strict=False)
    ]
    with torch.no_grad():
        rest = {k: v for k, v in checkpoint.items() if k != _OPTIMIZERS}
        found: dict[str, Any] = tree_map_with_path(by_path, rest)
    if unknown and keep:
        warnings.warn(
            f"This file may hold one process's parts of tensors that are split. Found: {', '.join(unknown[:4])}, of "
            "the shape of such parts. Do: keep copies of weights in a dict by their full names in the module.",
            stacklevel=2,
        )
    return {**found, _OPTIMIZERS: states} if _OPTIMIZERS in checkpoint else found


def _name_in(keys: Sequence[str], known: Mapping[str, Any], every: Collection[str]) -> str:
    """Return the parameter that the last of some keys names, perhaps with something before: `module.head.weight`."""
    for key in reversed(keys):
        if key in every:
            return key if key in known else ""
        while key:
            if key in known:
                return key
            key = key.partition(".")[2]
    return ""


def names_of(split: SplitModel, optimizer: Optimizer) -> dict[int, str]:
    """Return the names of an optimizer's parameters by their numbers in its state dict."""
    names = {id(p): n for n, p in split.model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {number: names[id(p)] for number, p in enumerate(parameters) if id(p) in names}


def parts_of_model(state: Mapping[str, Any], split: SplitModel) -> dict[str, Any]:
    """Return this process's part of a whole state dict."""
    return {n: split.part(n, v) if isinstance(v, Tensor) else v for n, v in state.items()}


def parts_of_optimizer(
    state: dict[str, Any], split: SplitModel, optimizer: Optimizer
) -> dict[str, Any]:
    """Return this process's part of the whole state of an optimizer."""
    ids = [number for group in state["param_groups"] for number in group["params"]]
    names = names_of(split, optimizer)
    by_id = {identity: names.get(place, "") for place, identity in enumerate(ids)}

    def part(name: str, value: Any) -> Any:
        is_whole = (
            isinstance(value, Tensor) and name in split.kept and value.shape == split.shape(name)
        )
        return split.part(name, value) if is_whole else value

    entries = {
        identity: tree_map(partial(part, by_id.get(identity, "")), entry)
        for identity, entry in state["state"].items()
    }
    return {**state, "state": entries}


def join_states(optimizers: Sequence[Optimizer], split: SplitModel) -> None:
    """Make the states of optimizers whole, before their weights are; all processes take part."""
    for optimizer in optimizers:
        _each(
            optimizer, split, lambda name, v, p: split.whole(name, v) if v.shape == p.shape else v
        )


def split_states(optimizers: Sequence[Optimizer], split: SplitModel) -> None:
    """Leave the states of optimizers this process's part, after their weights were split."""
    for optimizer in optimizers:
        _each(
            optimizer,
            split,
            lambda name, v, p: split.part(name, v) if v.shape == split.shape(name) else v,
        )


def _each(optimizer: Optimizer, split: SplitModel, change: Any) -> None:
    names = {id(p): n for n, p in split.model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter), "")
            if name in split.kept and parameter in optimizer.state:
                entry = optimizer.state[parameter]
                optimizer.state[parameter] = tree_map(
                    lambda v, n=name, p=parameter: change(n, v, p) if isinstance(v, Tensor) else v,
                    entry,
                )
