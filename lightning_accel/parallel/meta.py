"""Weights on the meta device, made where they are sharded: one unit at a time, so that no process holds all of them.

Layers made under `torch.device("meta")` have shapes only. Their own `reset_parameters` fills them on the host, unit after
unit, each process gets the numbers of the first, and the unit is sharded before the next is made. So the start is the same
for any number of processes; it is not that of a network made at once, which draws its numbers in another order. What a
checkpoint fills is allocated only.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from lightning_accel.errors import Unsupported
from lightning_accel.surgery.rng import random_state, set_random_state

_HOLDERS = ("_parameters", "_buffers", "_modules")


def on_meta(model: nn.Module) -> str | None:
    """Return a weight or buffer that is on the meta device, if there is one.

    >>> on_meta(nn.Linear(2, 2, device="meta")), on_meta(nn.Linear(2, 2))
    ('weight', None)
    """
    tensors = (*model.named_parameters(), *model.named_buffers())
    return next((name for name, t in tensors if is_empty(t)), None)


def materialize(model: nn.Module, *, fills: bool = True) -> bool:
    """Give what is on the meta device memory on the host, in place, and the numbers of its `reset_parameters`.

    Args:
        model: Whose parts that are sharded already are left alone.
        fills: Call `reset_parameters`; else numbers come from a checkpoint, and it is called for what is in none.

    Returns:
        Whether `reset_parameters` was called.

    Raises:
        Unsupported: A module cannot fill what it has.

    >>> net = nn.Linear(2, 2, device="meta")
    >>> materialize(net), net.weight.device.type
    (True, 'cpu')
    """
    made: dict[int, nn.Parameter] = {}
    called = False
    for name, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if is_empty(p)}
        buffers = {n for n, b in module._buffers.items() if is_empty(b)}
        if not own and not buffers:
            continue
        needs = {n for n, p in own.items() if id(p) not in made} | buffers  # tied: of the first
        needs &= needs if fills else module._non_persistent_buffers_set
        _require_filling(name, module, needs, fills=fills)
        with _kept(module):
            module._apply(_room, recurse=False)
            if needs:
                _fill(name, module, needs, (*own, *buffers))
                called = True
        for n, p in own.items():
            setattr(module, n, made.setdefault(id(p), module._parameters[n]))
            vars(module._parameters[n]).update(vars(p))  # `weight.no_decay = True`
    return called


def refuse_meta(model: nn.Module) -> None:
    """Raise where somebody needs weights before they are sharded.

    Raises:
        Unsupported: Some are on the meta device.
    """
    if name := on_meta(model):
        raise Unsupported(
            "weights are needed before they are copied, split or averaged",
            f"`{name}` is on the meta device",
            "make the network with its weights, or use `accel_fsdp` or `accel_auto` without averages",
        )


def refuse_loose(model: nn.Module) -> None:
    """Raise where a module keeps what nobody can fill.

    Raises:
        Unsupported: A tensor on the meta device is no parameter and no buffer, or has no shape yet.
    """
    owned = {id(tensor) for *_, tensor in named_tensors(model)}
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            held = value if isinstance(value, (Tensor, list, tuple, dict)) else ()
            found = () if name in _HOLDERS else tree_leaves(held)
            if any(is_empty(t) and t.grad_fn is None and id(t) not in owned for t in found):
                raise Unsupported(
                    "a tensor on the meta device that is no parameter and no buffer is filled by nobody",
                    f"`{f'{prefix}.{name}'.lstrip('.')}` ({type(module).__name__})",
                    "make it a buffer that `reset_parameters` fills, or make it with `device='cpu'`",
                )
    for full, module, _, tensor in named_tensors(model):
        if is_empty(tensor) and is_lazy(tensor):
            raise Unsupported(
                "a weight on the meta device has a shape",
                f"`{full}` ({type(module).__name__}) gets one in its first forward",
                "make the layer with its sizes, or with its weights and call it once",
            )


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and buffers that a module has itself, tied ones too."""
    both = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor) for name, tensor in both if tensor is not None]


def named_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Give all parameters and buffers, tied ones too, each with its module and its name there."""
    for prefix, module in model.named_modules():
        for name, tensor in own_tensors(module):
            yield f"{prefix}.{name}".lstrip("."), module, name, tensor


def is_empty(tensor: Any) -> bool:
    """Whether it is a tensor on the meta device, and no shard."""
    return isinstance(tensor, Tensor) and not isinstance(tensor, DTensor) and tensor.is_meta


def _require_filling(name: str, module: nn.Module, needs: Collection[str], *, fills: bool) -> None:
    if hasattr(module, "reset_parameters") or not needs:
        return
    what = "it has none" if fills else f"its buffer `{min(needs)}` is in no checkpoint"
    raise Unsupported(
        "a module on the meta device fills its weights and buffers in `reset_parameters`",
        f"`{name}` ({type(module).__name__}): {what}",
        "give it one, go on from a checkpoint, or make it with its weights",
    )


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Let a module write into copies of what it has with numbers, and give that back."""
    kept = [(n, t) for n, t in own_tensors(module) if not is_empty(t)]
    with torch.no_grad():
        for name, tensor in kept:
            shard = isinstance(tensor, DTensor)
            copy = torch.zeros(tensor.shape, dtype=tensor.dtype) if shard else tensor.clone()
            if name in module._parameters:
                module._parameters[name] = nn.Parameter(copy, tensor.requires_grad)
            else:
                module._buffers[name] = copy
    try:
        yield
    finally:
        for name, tensor in kept:
            setattr(module, name, tensor)


def _room(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu") if is_empty(tensor) else tensor


def _fill(name: str, module: Any, needs: Collection[str], fresh: Collection[str]) -> None:
    """Let a module fill what it has, and see that it did: what stays as it was before is found by filling it first.

    Where the numbers could be those of before, the same is done once more after other ones; it draws the same.
    """
    state = random_state()
    first = {n: t.detach() for n, t in _filled(module, needs, fresh, again=False).items()}
    if not any(bool(_as_before(t).any()) for t in first.values()):
        return
    first = {n: t.clone() for n, t in first.items()}
    set_random_state(state)
    for n, t in _filled(module, needs, fresh, again=True).items():
        left = _as_before(first[n]) & ~_as_before(t)
        if bool(left.any()):
            count = "" if bool(left.all()) else f"{int(left.sum())} numbers of "
            raise Unsupported(
                "a module on the meta device fills its weights and buffers in `reset_parameters`",
                f"{count}`{f'{name}.{n}'.lstrip('.')}` ({type(module).__name__}) are left as memory was",
                "fill it there too, go on from a checkpoint, or make the module with its weights",
            )


def _filled(
    module: Any, needs: Collection[str], fresh: Collection[str], *, again: bool
) -> dict[str, Tensor]:
    """Return tensors as `reset_parameters` leaves them that were full of one number."""
    with torch.no_grad():
        for name, tensor in own_tensors(module):
            if name in fresh:
                tensor.fill_(0 if again else _before(tensor))
    module.reset_parameters()
    return {n: t for n, t in own_tensors(module) if n in needs}


def _before(tensor: Tensor) -> Any:
    if tensor.is_floating_point() or tensor.is_complex():
        return float("nan")
    return True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max


def _as_before(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.isnan(
            tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        )
    return tensor.detach() == _before(tensor)
