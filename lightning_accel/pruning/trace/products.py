"""Rules of matrix products and convolutions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from lightning_accel.pruning.trace.channel_tracer import Axis, ChannelTracer, Info
from lightning_accel.pruning.trace.rule import broadcast, fixed_axes, put, rule
from lightning_accel.pruning.trace.union_find import Ids, UnionFind

_ALIGNED_BYTES = 16
"""Kernels of grouped products take only rows of a multiple of this."""


def _contract(tracer: ChannelTracer, left: Info, right: Info, a: Axis, b: Axis) -> None:
    # A sum over pairs: a place that is zero on one side is not missed on the other, so both can go.
    tracer.atoms.join(a.atoms, b.atoms)
    for info, axis in ((left, a), (right, b)):
        if info.source:
            tracer.read.append(axis.atoms)


def _makes(tracer: ChannelTracer, info: Info, axis: Axis) -> None:
    if info.source:
        tracer.made.append(axis.atoms)


@rule("mm", "matmul")
def _mm(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    _matrix(tracer, a["self"], a["mat2"], result)


@rule("addmm")
def _addmm(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    _matrix(tracer, a["mat1"], a["mat2"], result, a["self"])


def _matrix(
    tracer: ChannelTracer, one: Tensor, two: Tensor, result: Tensor, bias: Tensor | None = None
) -> None:
    left, right = tracer.info(one), tracer.info(two)
    _contract(tracer, left, right, left.axes[1], right.axes[0])
    # A weight can stand on either side: `x @ W` and `W @ x`.
    _makes(tracer, left, left.axes[0])
    _makes(tracer, right, right.axes[1])
    axes = [left.axes[0], right.axes[1]]
    tracer.multiply(*axes, left.axes[1])
    put(tracer, result, axes)
    if bias is not None:
        broadcast(tracer, [tracer.info(result), tracer.info(bias)], result.shape)


@rule("linear")
def _linear(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    left, weight = tracer.info(a["input"]), tracer.info(a["weight"])
    _contract(tracer, left, weight, left.axes[-1], weight.axes[1])
    _makes(tracer, weight, weight.axes[0])
    tracer.multiply(*left.axes, weight.axes[0])
    put(tracer, result, [*left.axes[:-1], weight.axes[0]])
    if a.get("bias") is not None:
        tracer.atoms.join(weight.axes[0].atoms, tracer.info(a["bias"]).axes[0].atoms)


@rule("bmm")
def _bmm(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    left, right = tracer.info(a["self"]), tracer.info(a["mat2"])
    # What was split off and is now the batch of a product are heads (Vaswani et al. 2017, arXiv:1706.03762):
    # each has its own scores, and nothing is lost between them.
    for axis in (left.axes[0], right.axes[0]):
        tracer.batched.update(dict(axis.factors))
    tracer.atoms.join(left.axes[0].atoms, right.axes[0].atoms)
    _contract(tracer, left, right, left.axes[2], right.axes[1])
    _makes(tracer, left, left.axes[1])
    _makes(tracer, right, right.axes[2])
    axes = [left.axes[0], left.axes[1], right.axes[2]]
    tracer.multiply(*axes, left.axes[2])
    put(tracer, result, axes)


@rule("baddbmm")
def _baddbmm(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    _bmm(tracer, {"self": a["batch1"], "mat2": a["batch2"]}, result)
    broadcast(tracer, [tracer.info(result), tracer.info(a["self"])], result.shape)


@rule("_grouped_mm")
def _grouped_mm(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    left, right = tracer.info(a["self"]), tracer.info(a["mat2"])
    if len(left.axes) != 2 or len(right.axes) != 3:
        raise ValueError("only rows of (tokens, inputs) by (experts, inputs, outputs)")
    tracer.fix(right.axes[0], "experts are picked by number")
    _contract(tracer, left, right, left.axes[1], right.axes[1])
    _makes(tracer, right, right.axes[2])
    # Of `torch._grouped_mm`: strides of whole blocks of 16 bytes, in the format of the weights.
    multiple = max(1, _ALIGNED_BYTES // a["mat2"].element_size())
    tracer.aligned += [(x.atoms, multiple) for x in (left.axes[1], right.axes[2])]
    tracer.multiply(*left.axes, right.axes[2])
    put(tracer, result, [left.axes[0], right.axes[2]])


@rule("mv", "addmv")
def _mv(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    left, right = tracer.info(a.get("mat", a["self"])), tracer.info(a["vec"])
    _contract(tracer, left, right, left.axes[1], right.axes[0])
    tracer.multiply(*left.axes)
    put(tracer, result, [left.axes[0]])


@rule("_trilinear")
def _trilinear(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    infos = [tracer.info(a[key]) for key in ("i1", "i2", "i3")]
    # nn.Bilinear: each operand gets dimensions of size 1 where it has none, all are multiplied, and some
    # summed.
    spread: list[list[Axis | None]] = []
    for info, key in zip(infos, ("expand1", "expand2", "expand3"), strict=True):
        axes: list[Axis | None] = list(info.axes)
        for dim in a[key]:
            axes.insert(dim, None)
        spread.append(axes)
    joined = []
    for dim, met in enumerate(zip(*spread, strict=True)):
        here = [axis for axis in met if axis is not None]
        for axis in here[1:]:
            tracer.atoms.join(here[0].atoms, axis.atoms)
        for info, axis in zip(infos, met, strict=True):
            if info.source and axis is not None:
                (tracer.read if dim in a["sumdim"] else tracer.made).append(axis.atoms)
        joined.append(here[0])
    tracer.multiply(*joined)
    put(tracer, result, [axis for dim, axis in enumerate(joined) if dim not in a["sumdim"]])


@rule("_cdist_forward", "_euclidean_dist")
def _cdist(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    left, right = tracer.info(a["x1"]), tracer.info(a["x2"])
    # A distance sums over coordinates: what is zero on both sides adds nothing to it.
    _contract(tracer, left, right, left.axes[-1], right.axes[-1])
    _makes(tracer, left, left.axes[-2])
    _makes(tracer, right, right.axes[-2])
    fixed_axes(tracer, result, [*tracer.info(a["x1"]).axes[:-1], right.axes[-2]])


@rule("dot", "vdot")
def _dot(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    left, right = tracer.info(a["self"]), tracer.info(a["tensor" if "tensor" in a else "other"])
    tracer.atoms.join(left.axes[0].atoms, right.axes[0].atoms)
    put(tracer, result, [])


@rule("convolution", "convolution_overrideable", "_convolution")
def _convolution(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    x, weight = tracer.info(a["input"]), tracer.info(a["weight"])
    transposed, groups = a["transposed"], a["groups"]
    spatial = len(weight.axes) - 2
    reason = "it is a spatial dimension"
    for axis in (*weight.axes[2:], *x.axes[-spatial:]):
        tracer.fix(axis, reason)
    rows, columns = weight.axes[:2]
    # From the end, for an input may come without a batch.
    source = x.axes[-spatial - 1]
    if groups == 1:
        inner, outer = (rows, columns) if transposed else (columns, rows)
        _contract(tracer, x, weight, source, inner)
        tracer.groups = None
    else:
        inner, outer = _grouped(tracer, source, rows, columns, groups, transposed)
        if weight.source and not transposed:
            tracer.read.append(columns.atoms)
    _makes(tracer, weight, columns if transposed else rows)
    if transposed and groups > 1:
        _makes(tracer, weight, rows)
    if a["bias"] is not None:
        tracer.atoms.join(outer.atoms, tracer.info(a["bias"]).axes[0].atoms)
    axes: list[Axis | None] = [*x.axes[: -spatial - 1], outer]
    fixed_axes(tracer, result, axes)
    # A convolution does its kernel's work once per output place, a transposed one once per input place.
    over = x.axes if transposed else tracer.info(result).axes
    tracer.multiply(
        *over, columns if groups > 1 or not transposed else outer, times=_kernel(weight)
    )


def _kernel(weight: Info) -> int:
    return math.prod(len(x.atoms) for x in weight.axes[2:])


def _grouped(
    tracer: ChannelTracer, source: Axis, rows: Axis, columns: Axis, groups: int, transposed: bool
) -> tuple[Axis, Axis]:
    """Join what a grouped convolution needs; return its input's and its output's channels."""
    into = source.atoms.reshape(groups, -1)
    if transposed:
        tracer.atoms.join(into, rows.atoms.reshape(groups, -1))
        # Its weight is (inputs, outputs of one group): a column stands for that place in every group's outputs.
        outer = tracer.atoms.fresh(groups * len(columns.atoms))
    else:
        outer = rows.atoms
    out = outer.reshape(groups, -1)
    if by_groups(tracer, into, out):
        tracer.atoms.join(into[:, :1], into)
        tracer.atoms.join(into[:, :1], out)
        tracer.atoms.fix(columns.atoms, "the groups of a convolution stay whole")
        tracer.groups = into[:, 0]
    else:
        # Its weight is (outputs, inputs of one group), so the same places of all groups go, and `groups` stays.
        tracer.atoms.join(into[:1], into)
        tracer.atoms.join(out[:1], out)
        tracer.atoms.join((out if transposed else into)[0], columns.atoms)
        tracer.groups = None
    return source, Axis(outer)


def by_groups(tracer: ChannelTracer, into: Ids, out: Ids) -> bool:
    """Whether whole groups go, rather than the same places of every group: what leaves more choice."""
    if not tracer.groups_adjustable:
        return False
    # Depthwise: a channel is a group.
    if into.shape[1] == 1:
        return True
    if tracer.atoms.is_fixed(into).any() or tracer.atoms.is_fixed(out).any():
        return False
    both = np.concatenate([into, out], axis=1)
    return _parts(tracer, both[:, :1], both) > _parts(tracer, both[:1], both)


def _parts(tracer: ChannelTracer, one: Ids, other: Ids) -> int:
    """Return into how many parts `other` falls once `one` is joined to it."""
    # Tried on a copy with new numbers, for a join cannot be undone.
    roots = tracer.atoms.find(other)
    known, places = np.unique(roots, return_inverse=True)
    trial = UnionFind()
    trial.fresh(len(known))
    labels = places.reshape(other.shape)
    first = np.searchsorted(known, tracer.atoms.find(one))
    trial.join(first, labels)
    return len(np.unique(trial.find(labels)))
