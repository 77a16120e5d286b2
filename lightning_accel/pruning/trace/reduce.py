"""Rules of operations that run along a dimension: sums and means, softmax, transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_accel.pruning.trace.flow import Flow
from lightning_accel.pruning.trace.rule import (
    broadcast,
    fixing,
    pointwise,
    put,
    rule,
    still,
    tensors_in,
)


@rule("roll")
def _roll(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    # A channel would come to lie where another was, by a number of places that is written in the code.
    fixing(flow, a["self"], a.get("dims") or range(result.dim()), "it is rolled", result)


@rule(
    "_softmax", "_log_softmax", "_safe_softmax", "softmax", "cumsum", "cumprod", "sort", "argsort"
)
@rule("logcumsumexp", "cummax", "cummin")
def _across(flow: Flow, a: dict[str, Any], result: Any) -> None:
    # Zero is not nothing here: a softmax gives it exp(0), a sort a place. So without it the others change.
    fixing(flow, a["self"], [a.get("dim", -1)], "its channels compete", result)


@rule("tril", "triu")
def _triangle(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    fixing(flow, a["self"], [-1, -2], "it is a triangle", result)


@rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _fft(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    # Each frequency hangs on all places, and on how many there are.
    fixing(flow, a["self"], a["dim"], "a Fourier transform runs over it", result)


@rule(
    "sum", "mean", "amax", "amin", "max", "min", "any", "all", "var", "std", "var_mean", "std_mean"
)
@rule("linalg_vector_norm", "norm", "count_nonzero")
def _reduce(flow: Flow, a: dict[str, Any], result: Any) -> None:
    # `max` and `min` of two tensors are overloads that work place by place.
    if "other" in a:
        return pointwise(flow, a, result)
    info = flow.info(a["self"])
    dims = a.get("dim")
    dims = range(len(info.axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % max(len(info.axes), 1) for d in (dims if len(dims) else range(len(info.axes)))}
    if a.get("keepdim"):
        axes = [flow.still(1, "it is reduced") if n in gone else x for n, x in enumerate(info.axes)]
    else:
        axes = [x for n, x in enumerate(info.axes) if n not in gone]
    # Channels may be reduced: a sum takes zero for nothing, and a mean or a maximum is a statistic, which
    # changes with the width by design (see `statistics`).
    for tensor in tensors_in(result):
        if tensor.dim() == len(axes):
            put(flow, tensor, axes)
        else:
            still(flow, tensor)
    return None


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss")
def _loss(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    inputs = [flow.info(a["self"]), flow.info(a["target"])]
    axes = broadcast(flow, inputs, torch.broadcast_shapes(a["self"].shape, a["target"].shape))
    put(flow, result, axes if result.dim() == len(axes) else [])


@rule("logsumexp", "prod", "argmax", "argmin")
def _compete(flow: Flow, a: dict[str, Any], result: Any) -> None:
    info = flow.info(a["self"])
    dims = a.get("dim")
    dims = range(len(info.axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    # exp(0) is 1 in the sum, zero makes a product zero, and a place that is returned is counted from the start.
    for dim in dims:
        flow.fix(info.axes[dim], "its channels compete")
    _reduce(flow, a, result)


@rule("view_as_real")
def _view_as_real(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    still(flow, result, flow.info(a["self"]).axes)


@rule("view_as_complex")
def _view_as_complex(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    # Its two places are the real and the imaginary part of each number.
    flow.fix(info.axes[-1], "it holds complex parts")
    put(flow, result, info.axes[:-1])
