"""Ranges of what comes into layers while a network trains, as moving averages that all processes share."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch import distributed as dist

from lightning_accel.quantization.layers import QuantizedLayer


@torch.no_grad()
def move_ranges(layers: Collection[QuantizedLayer], momentum: float, *, shared: bool) -> None:
    """Move the range of each layer towards what came in since the last time; the first time it becomes that.

    Args:
        layers: The same ones in the same order in all processes.
        momentum: Weight of the new range.
        shared: Whether to take in what other processes saw: all of them must call.
    """
    watched = [layer for layer in layers if layer.accel_grid.has_range]
    if not watched:
        return
    seen = torch.stack([layer.take_seen() for layer in watched])  # (layers, 2)
    if shared:
        seen = _over_processes(seen)
    came_in = seen[:, :1] <= seen[:, 1:]
    before = torch.stack([layer.accel_range for layer in watched])
    known = before[:, :1] <= before[:, 1:]
    moved = torch.where(known, before + momentum * (seen - before), seen)
    moved = torch.where(came_in & seen.isfinite().all(1, keepdim=True), moved, before)
    for layer, range_ in zip(watched, moved, strict=True):
        layer.accel_range.copy_(range_)


@torch.no_grad()
def make_alike(copy: QuantizedLayer, layer: QuantizedLayer) -> None:
    """Let the layer of an average compute as that of the module; what is learned stays its own."""
    copy.accel_mode, copy.accel_known = layer.accel_mode, layer.accel_known
    copy.accel_range.copy_(layer.accel_range)
    if layer.accel_scale is not None:
        copy.set_scale(layer.accel_scale)


def _over_processes(seen: Tensor) -> Tensor:
    """Return the smallest and the largest value of all processes."""
    both = seen * seen.new_tensor([-1.0, 1.0])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return both * both.new_tensor([-1.0, 1.0])
