"""Rules of norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_accel.pruning.trace.flow import Axis, Flow
from lightning_accel.pruning.trace.products import by_groups
from lightning_accel.pruning.trace.rule import put, rule, still, tensors_in


@rule("native_layer_norm", "_fused_rms_norm", "layer_norm", "rms_norm")
def _layer_norm(flow: Flow, a: dict[str, Any], result: Any) -> None:
    x = flow.info(a["input"])
    for key in ("weight", "bias"):
        if a.get(key) is not None:
            own = flow.info(a[key])
            for axis, other in zip(x.axes[-len(own.axes) :], own.axes, strict=True):
                flow.atoms.join(axis.atoms, other.atoms)
    # Mean and scale of each place are over all channels, and so over fewer after a cut: `statistics` sees to
    # that.
    first, *rest = tensors_in(result)
    put(flow, first, x.axes)
    still(flow, rest, x.axes)


@rule("native_group_norm")
def _group_norm(flow: Flow, a: dict[str, Any], result: Any) -> None:
    x = flow.info(a["input"])
    _channelwise(flow, a, x.axes[1], ("weight", "bias"))
    groups = a["group"]
    grid = x.axes[1].atoms.reshape(groups, -1)
    flow.groups = None
    # torch wants equal groups: either whole ones go, or the same places of every one.
    if by_groups(flow, grid, grid):
        flow.atoms.join(grid[:, :1], grid)
        flow.groups = grid[:, 0]
    # With one group there is nothing to keep equal: single channels can go.
    elif groups > 1:
        flow.atoms.join(grid[:1], grid)
    first, *rest = tensors_in(result)
    put(flow, first, x.axes)
    still(flow, rest, x.axes[:1])


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@rule("cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm")
@rule("batch_norm_elemt")
def _batch_norm(flow: Flow, a: dict[str, Any], result: Any) -> None:
    x = flow.info(a["input"])
    _channelwise(flow, a, x.axes[1], ("weight", "bias", "running_mean", "running_var", "mean"))
    first, *rest = tensors_in(result)
    # Standardized convolutions (Qiao et al. 2019, arXiv:1903.10520) call a batch norm on their weight.
    put(flow, first, x.axes, x.source)  # a standardized weight stays one
    still(flow, rest, [x.axes[1]])


def _channelwise(flow: Flow, a: dict[str, Any], channels: Axis, keys: Sequence[str]) -> None:
    for key in keys:
        if isinstance(a.get(key), Tensor):
            flow.atoms.join(channels.atoms, flow.info(a[key]).axes[0].atoms)


@rule("_weight_norm_interface")
def _weight_norm(flow: Flow, a: dict[str, Any], result: Any) -> None:
    v, g, dim = flow.info(a["v"]), flow.info(a["g"]), a.get("dim", 0)
    flow.atoms.join(v.axes[dim].atoms, g.axes[dim].atoms)
    # w = g v / |v| (Salimans and Kingma 2016, arXiv:1602.07868): with inputs gone |v| is smaller, and every
    # weight that stays would grow. `Graph` lowers g by as much.
    if v.source and g.source:
        flow.normed.append((v.source, g.source, dim))
    weight, *rest = tensors_in(result)
    put(flow, weight, v.axes, v.source)
    still(flow, rest)
