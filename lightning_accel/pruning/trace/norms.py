"""Rules of norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_accel.pruning.trace.channel_tracer import Axis, ChannelTracer
from lightning_accel.pruning.trace.products import by_groups
from lightning_accel.pruning.trace.rule import fixed_axes, put, rule, tensors_in


@rule("native_layer_norm", "_fused_rms_norm", "layer_norm", "rms_norm")
def _layer_norm(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    x = tracer.info(a["input"])
    for key in ("weight", "bias"):
        if a.get(key) is not None:
            own = tracer.info(a[key])
            for axis, other in zip(x.axes[-len(own.axes) :], own.axes, strict=True):
                tracer.atoms.join(axis.atoms, other.atoms)
    # Mean and scale of each place are over all channels, and so over fewer after a cut: `statistics` sees to
    # that.
    first, *rest = tensors_in(result)
    put(tracer, first, x.axes)
    fixed_axes(tracer, rest, x.axes)


@rule("native_group_norm")
def _group_norm(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    x = tracer.info(a["input"])
    _channelwise(tracer, a, x.axes[1], ("weight", "bias"))
    groups = a["group"]
    grid = x.axes[1].atoms.reshape(groups, -1)
    tracer.groups = None
    # torch wants equal groups: either whole ones go, or the same places of every one.
    if by_groups(tracer, grid, grid):
        tracer.atoms.join(grid[:, :1], grid)
        tracer.groups = grid[:, 0]
    # With one group there is nothing to keep equal: single channels can go.
    elif groups > 1:
        tracer.atoms.join(grid[:1], grid)
    first, *rest = tensors_in(result)
    put(tracer, first, x.axes)
    fixed_axes(tracer, rest, x.axes[:1])


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm")
@rule("batch_norm_elemt")
def _batch_norm(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    x = tracer.info(a["input"])
    _channelwise(tracer, a, x.axes[1], ("weight", "bias", "running_mean", "running_var", "mean"))
    first, *rest = tensors_in(result)
    # Standardized convolutions (Qiao et al. 2019, arXiv:1903.10520) call a batch norm on their weight.
    put(tracer, first, x.axes, x.source)  # a standardized weight stays one
    fixed_axes(tracer, rest, [x.axes[1]])


def _channelwise(
    tracer: ChannelTracer, a: dict[str, Any], channels: Axis, keys: Sequence[str]
) -> None:
    for key in keys:
        if isinstance(a.get(key), Tensor):
            tracer.atoms.join(channels.atoms, tracer.info(a[key]).axes[0].atoms)


@rule("_weight_norm_interface")
def _weight_norm(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    v, g, dim = tracer.info(a["v"]), tracer.info(a["g"]), a.get("dim", 0)
    tracer.atoms.join(v.axes[dim].atoms, g.axes[dim].atoms)
    # w = g v / |v| (Salimans and Kingma 2016, arXiv:1602.07868): with inputs gone |v| is smaller, and every
    # weight that stays would grow. `Graph` lowers g by as much.
    if v.source and g.source:
        tracer.normed.append((v.source, g.source, dim))
    weight, *rest = tensors_in(result)
    put(tracer, weight, v.axes, v.source)
    fixed_axes(tracer, rest)
