"""Tensors of a network that are in several places, as the same object or as the same memory."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn


def shared_tensors(model: nn.Module) -> set[int]:
    """Return the identities of parameters and buffers that are in several places, or whose memory is also that of others.

    >>> shared_tensors(nn.Linear(2, 2))
    set()
    """
    places = [
        one
        for module in model.modules()
        for one in (*module._parameters.values(), *module._buffers.values())
        if one is not None
    ]
    counts = Counter(map(id, places))
    found = {one for one, count in counts.items() if count > 1}
    each = {id(one): one for one in places}
    spans = sorted((*span, name) for name, one in each.items() if (span := _memory(one)))
    last, of_last = -1, 0
    for start, end, one in spans:
        if start < last:  # as after `a.weight.data = b.weight.data`
            found |= {one, of_last}
        if end > last:
            last, of_last = end, one
    return found


@torch.no_grad()
def share_alike(copy: nn.Module, model: nn.Module) -> None:
    """Let parameters of a deep copy share memory where those of the model do: copying gives each memory of its own.

    >>> net, made = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> net[1].weight.data = net[0].weight.data
    >>> share_alike(made, net)
    >>> made[1].weight.data_ptr() == made[0].weight.data_ptr()
    True
    """
    shared, storages = shared_tensors(model), {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in shared or _memory(parameter) is None:
            continue
        held = parameter.untyped_storage()
        if held.data_ptr() not in storages:
            storages[held.data_ptr()] = held.clone()
        place = parameter.storage_offset(), parameter.shape, parameter.stride()
        values = parameter.new_empty(0).set_(storages[held.data_ptr()], *place)
        copy.get_parameter(name).data = values


def _memory(tensor: Tensor) -> tuple[int, int] | None:
    """Return where a tensor begins and ends in the memory of its device; nothing where that is not to be known."""
    if tensor.is_sparse or tensor.is_nested or tensor.device.type in ("meta", "xla"):
        return None
    try:
        start = tensor.data_ptr()
    except RuntimeError:  # of a subclass without memory of its own
        return None
    if not start or not tensor.numel():
        return None
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
