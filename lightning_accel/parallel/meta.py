"""Weights on the meta device, made where they are sharded: one unit at a time, so that no process holds all of them.

Layers made under `torch.device("meta")` have shapes only. Their own `reset_parameters` fills them on the host, unit after
unit, each process gets the numbers of the first, and the unit is sharded before the next is made. So the start is the same
for any number of processes; it is not that of a network made at once, which draws its numbers in another order. What a
checkpoint fills is allocated only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightning_accel.errors import Unsupported


def on_meta(model: nn.Module) -> str | None:
    """Return a weight or buffer that is on the meta device, if there is one.

    >>> on_meta(nn.Linear(2, 2, device="meta")), on_meta(nn.Linear(2, 2))
    ('weight', None)
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, t in tensors if not isinstance(t, DTensor) and t.is_meta), None)


def materialize(model: nn.Module, *, fills: bool = True) -> None:
    """Give what is on the meta device memory on the host, in place, and the numbers of its `reset_parameters`.

    Args:
        model: Whose parts that are sharded already are left alone.
        fills: Call `reset_parameters`; else numbers come from a checkpoint.

    Raises:
        Unsupported: A module cannot fill what it has.

    >>> net = nn.Linear(2, 2, device="meta")
    >>> materialize(net)
    >>> net.weight.device.type
    'cpu'
    """
    made: dict[int, nn.Parameter] = {}
    for name, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if _is_empty(p)}
        if not own and not any(_is_empty(b) for b in module._buffers.values()):
            continue
        _require_filling(name, module, fills=fills)
        module.to_empty(device="cpu", recurse=False)
        new = {n: made.get(id(p)) for n, p in own.items()}
        if fills and (
            not own or any(p is None for p in new.values())
        ):  # what is tied is filled by the first that has it
            module.reset_parameters()
        for n, p in own.items():
            module._parameters[n] = made.setdefault(id(p), module._parameters[n])
            vars(module._parameters[n]).update(vars(p))  # `weight.no_decay = True`


def refuse_meta(model: nn.Module) -> None:
    """Raise where somebody needs weights before they are sharded.

    Raises:
        Unsupported: Some are on the meta device.
    """
    if name := on_meta(model):
        raise Unsupported(
            "weights are needed before they are split or averaged",
            f"`{name}` is on the meta device",
            "make the network with its weights, or use `FSDP2Strategy` without averages",
        )


def _is_empty(tensor: Any) -> bool:
    return isinstance(tensor, torch.Tensor) and not isinstance(tensor, DTensor) and tensor.is_meta


def _require_filling(name: str, module: nn.Module, *, fills: bool) -> None:
    buffers = {n for n, b in module._buffers.items() if _is_empty(b)}
    lost = sorted(buffers & module._non_persistent_buffers_set)
    if hasattr(module, "reset_parameters") or (not fills and not lost):
        return
    what = f"its buffer `{lost[0]}` is in no checkpoint" if lost and not fills else "it has none"
    raise Unsupported(
        "a module on the meta device fills its weights and buffers in `reset_parameters`",
        f"`{name}` ({type(module).__name__}): {what}",
        "give it one, go on from a checkpoint, or make it with its weights",
    )
