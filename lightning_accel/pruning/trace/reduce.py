"""Rules of operations that run along a dimension: sums and means, softmax, transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_accel.pruning.trace.channel_tracer import ChannelTracer
from lightning_accel.pruning.trace.rule import (
    broadcast,
    fixed_axes,
    fixing,
    pointwise,
    put,
    rule,
    tensors_in,
)


@rule("roll")
def _roll(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    # A channel would come to lie where another was, by a number of places that is written in the code.
    fixing(tracer, a["self"], a.get("dims") or range(result.dim()), "it is rolled", result)


@rule(
    "_softmax", "_log_softmax", "_safe_softmax", "softmax", "cumsum", "cumprod", "sort", "argsort"
)
@rule("logcumsumexp", "cummax", "cummin")
def _across(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    # Zero is not nothing here: a softmax gives it exp(0), a sort a place. So without it the others change.
    fixing(tracer, a["self"], [a.get("dim", -1)], "its channels compete", result)


@rule("tril", "triu")
def _triangle(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    fixing(tracer, a["self"], [-1, -2], "it is a triangle", result)


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _fft(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    # Each frequency hangs on all places, and on how many there are.
    fixing(tracer, a["self"], a["dim"], "a Fourier transform runs over it", result)


@rule(
    "sum", "mean", "amax", "amin", "max", "min", "any", "all", "var", "std", "var_mean", "std_mean"
)
@rule("linalg_vector_norm", "norm", "count_nonzero")
def _reduce(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    # `max` and `min` of two tensors are overloads that work place by place.
    if "other" in a:
        return pointwise(tracer, a, result)
    info = tracer.info(a["self"])
    dims = a.get("dim")
    dims = range(len(info.axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % max(len(info.axes), 1) for d in (dims if len(dims) else range(len(info.axes)))}
    if a.get("keepdim"):
        axes = [
            tracer.still(1, "it is reduced") if n in gone else x for n, x in enumerate(info.axes)
        ]
    else:
        axes = [x for n, x in enumerate(info.axes) if n not in gone]
    # Channels may be reduced: a sum takes zero for nothing, and a mean or a maximum is a statistic, which
    # changes with the width by design (see `statistics`).
    for tensor in tensors_in(result):
        if tensor.dim() == len(axes):
            put(tracer, tensor, axes)
        else:
            fixed_axes(tracer, tensor)
    return None


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss")
def _loss(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    inputs = [tracer.info(a["self"]), tracer.info(a["target"])]
    axes = broadcast(tracer, inputs, torch.broadcast_shapes(a["self"].shape, a["target"].shape))
    put(tracer, result, axes if result.dim() == len(axes) else [])


@rule("logsumexp", "prod", "argmax", "argmin")
def _compete(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    info = tracer.info(a["self"])
    dims = a.get("dim")
    dims = range(len(info.axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    # exp(0) is 1 in the sum, zero makes a product zero, and a place that is returned is counted from the start.
    for dim in dims:
        tracer.fix(info.axes[dim], "its channels compete")
    _reduce(tracer, a, result)


@rule("view_as_real")
def _view_as_real(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    fixed_axes(tracer, result, tracer.info(a["self"]).axes)


@rule("view_as_complex")
def _view_as_complex(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    # Its two places are the real and the imaginary part of each number.
    tracer.fix(info.axes[-1], "it holds complex parts")
    put(tracer, result, info.axes[:-1])
