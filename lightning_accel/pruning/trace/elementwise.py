"""Rules of operations that keep every dimension, and of tensors made anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_accel.pruning.trace.channel_tracer import Axis, ChannelTracer
from lightning_accel.pruning.trace.rule import pointwise, put, rule

# Some of these torch tags as pointwise, in some releases and overloads; those with several results or a state,
# such as dropout and copies, in none.
rule(
    "where",
    "masked_fill",
    "copy",
    "_prelu_kernel",
    "clamp",
    "clamp_min",
    "clamp_max",
    "lerp",
    "addcmul",
    "addcdiv",
    "bernoulli",
    "complex",
    "polar",
    "native_dropout",
    "fill",
    "zero",
    "uniform",
    "normal",
    "random",
    "exponential",
    "bitwise_and",
    "bitwise_or",
    "bitwise_not",
    "logical_and",
    "logical_or",
    "logical_not",
    "isin",
    "nan_to_num",
    "hardswish",
    "log_sigmoid_forward",
    "rrelu_with_noise",
    "rsub",
)(pointwise)


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty")
@rule("new_full", "empty_strided", "new_empty_strided")
def _constant(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    # Free, not fixed: the state that a recurrent net begins with is as wide as an attribute says, which
    # `numbers` has noted. What it then meets decides.
    put(tracer, result, [Axis(tracer.atoms.fresh(n)) for n in result.shape])
