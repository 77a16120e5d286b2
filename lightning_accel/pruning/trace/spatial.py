"""Rules of pooling, resampling and shuffling."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from lightning_accel.pruning.trace.channel_tracer import Axis, ChannelTracer
from lightning_accel.pruning.trace.rule import RULES, Rule, fixed_axes, put, rule


def _spatial(last: int) -> Rule:
    def rule(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
        info = tracer.info(a["self"] if "self" in a else a["input"])
        places = tracer.info(a["grid"]).axes if "grid" in a else ()
        # How many places come out hangs on how many go in: the size of an image is no choice of ours.
        for axis in (*info.axes[-last:], *places):
            tracer.fix(axis, "it is a spatial dimension")
        fixed_axes(tracer, result, info.axes[:-last])

    return rule


for _name in [
    "max_pool{}d_with_indices",
    "avg_pool{}d",
    "_adaptive_avg_pool{}d",
    "adaptive_avg_pool{}d",
    "adaptive_max_pool{}d",
    "max_pool{}d",
    "reflection_pad{}d",
    "replication_pad{}d",
    "upsample_nearest{}d",
    "_upsample_nearest_exact{}d",
    "fractional_max_pool{}d",
    "upsample_bilinear{}d",
    "upsample_linear{}d",
    "upsample_trilinear{}d",
    "upsample_bicubic{}d",
    "_upsample_bicubic{}d_aa",
    "_upsample_bilinear{}d_aa",
    "grid_sampler_{}d",
    "quantized_max_pool{}d",
]:
    for _last in (1, 2, 3):
        RULES[_name.format(_last)] = _spatial(_last)


@rule("max_unpool2d", "max_unpool3d")
def _unpool(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info, places = tracer.info(a["self"]), tracer.info(a["indices"])
    last = 3 if tracer.operation.endswith("3d") else 2
    # The indices come from a pooling of as many channels.
    for axis, other in zip(info.axes[:-last], places.axes[:-last], strict=True):
        tracer.atoms.join(axis.atoms, other.atoms)
    for axis in (*info.axes[-last:], *places.axes[-last:]):
        tracer.fix(axis, "it is a spatial dimension")
    fixed_axes(tracer, result, info.axes[:-last])


@rule("im2col")
def _im2col(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    channels = info.axes[-3]
    for axis in info.axes[-2:]:
        tracer.fix(axis, "it is a spatial dimension")
    # Columns hold all places of the kernel of the first channel, then of the second: each channel so many
    # times.
    times = result.shape[-2] // len(channels.atoms)
    fixed_axes(tracer, result, [*info.axes[:-3], Axis(np.repeat(channels.atoms, times)), None])


@rule("col2im")
def _col2im(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    channels = result.shape[-3]
    # `im2col` backwards: all places of the kernel make one channel, and go with it.
    grid = info.axes[-2].atoms.reshape(channels, -1)
    tracer.atoms.join(grid[:, :1], grid)
    fixed_axes(tracer, result, [*info.axes[:-2], Axis(grid[:, 0]), None, None])


@rule("pixel_shuffle")
def _pixel_shuffle(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    # r^2 neighbouring channels make one of r x r times the pixels (Shi et al. 2016, arXiv:1609.05158).
    grid = info.axes[-3].atoms.reshape(result.shape[-3], -1)
    tracer.atoms.join(grid[:, :1], grid)
    fixed_axes(tracer, result, [*info.axes[:-3], Axis(grid[:, 0]), None, None])


@rule("pixel_unshuffle")
def _pixel_unshuffle(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    times = result.shape[-3] // len(info.axes[-3].atoms)
    axis = Axis(np.repeat(info.axes[-3].atoms, times))
    fixed_axes(tracer, result, [*info.axes[:-3], axis, None, None])


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    # ShuffleNet's (Zhang et al. 2018, arXiv:1707.01083): (groups, n) is read as (n, groups). Groups have to
    # stay equal, so the same places of all of them go.
    grid = info.axes[1].atoms.reshape(a["groups"], -1)
    tracer.atoms.join(grid[:1], grid)
    axes = list(info.axes)
    axes[1] = Axis(grid.T.reshape(-1))
    put(tracer, result, axes)
