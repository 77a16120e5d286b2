"""Rules of operations that take dimensions apart, pick from them, and put them together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accel.pruning.trace.channel_tracer import Axis, ChannelTracer
from lightning_accel.pruning.trace.rule import broadcast, fixed_axes, fixing, put, rule, tensors_in


@rule("slice")
def _slice(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    dim, step = a.get("dim", 0), a.get("step", 1)
    start, end = a.get("start"), a.get("end")
    axis = info.axes[dim]
    # With a place gone before them, a step would hit other places than it did.
    if step != 1:
        tracer.fix(axis, "it is sliced with a step")
    axes = list(info.axes)
    axes[dim] = Axis(axis.atoms[start:end:step], axis.factors)
    put(tracer, result, axes, info.source)


@rule("select")
def _select(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    axes = list(info.axes)
    atoms, index = axes.pop(a["dim"]).atoms, int(a["index"])
    # It must stay, and so must all that it is counted from.
    tracer.fix(Axis(atoms[: index + 1] if index >= 0 else atoms[index:]), "it is picked by number")
    put(tracer, result, axes, info.source)


@rule("unbind")
def _unbind(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    info = tracer.info(a["self"])
    axes = list(info.axes)
    tracer.fix(axes.pop(a.get("dim", 0)), "it is unbound")
    for tensor in result:
        put(tracer, tensor, axes, info.source)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk")
@rule("unsafe_chunk")
def _pieces(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    info, start = tracer.info(a["self"]), 0
    dim = a.get("dim", 0)
    for tensor in result:
        axes, size = list(info.axes), tensor.shape[dim]
        axes[dim] = Axis(axes[dim].atoms[start : start + size], axes[dim].factors)
        put(tracer, tensor, axes, info.source)
        start += size


@rule("cat", "concat")
def _cat(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    # torch passes over empty tensors of one dimension, whatever the shape of the others (a legacy of its own).
    infos = [tracer.info(t) for t in a["tensors"] if tuple(t.shape) != (0,)]
    dim = a.get("dim", 0) % max(result.dim(), 1)
    axes = []
    for n in range(result.dim()):
        if n == dim:
            # Side by side each part is free by itself, as in dense blocks (Huang et al. 2017,
            # arXiv:1608.06993).
            axes.append(Axis(np.concatenate([i.axes[n].atoms for i in infos])))
        else:
            for other in infos[1:]:
                tracer.atoms.join(infos[0].axes[n].atoms, other.axes[n].atoms)
            axes.append(infos[0].axes[n])
    put(tracer, result, axes)


@rule("stack")
def _stack(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    infos = [tracer.info(t) for t in a["tensors"]]
    axes = broadcast(tracer, infos, a["tensors"][0].shape)
    axes.insert(a.get("dim", 0) % result.dim(), tracer.still(len(infos), "it is stacked"))
    put(tracer, result, axes)


@rule("flip")
def _flip(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    dims = {d % result.dim() for d in a["dims"]}
    put(
        tracer,
        result,
        [
            Axis(x.atoms[::-1].copy(), x.factors) if n in dims else x
            for n, x in enumerate(info.axes)
        ],
    )


@rule("topk")
def _topk(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    fixing(tracer, a["self"], [a.get("dim", -1)], "places of it are picked", result)


@rule("gather")
def _gather(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    _scattered(tracer, a["self"], a["index"], a["dim"])
    # What comes out is as large as the index, whose places may all be used.
    pairs = zip(tracer.info(a["index"]).axes, tracer.info(a["self"]).axes, strict=True)
    put(tracer, result, [Axis(x.atoms, x.factors | other.factors) for x, other in pairs])


@rule("kthvalue")
def picked(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    for tensor in tensors_in(a):
        for axis in tracer.info(tensor).axes:
            tracer.fix(axis, "places of it are picked")
    fixed_axes(tracer, result)


@rule("index_add", "index_copy", "index_reduce")
def _index_add(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    _scattered(tracer, a["self"], a["source"], a["dim"])
    put(tracer, result, tracer.info(a["self"]).axes)


@rule("scatter_add", "scatter_reduce", "scatter")
def _scatter(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    source = a.get("src")
    if isinstance(source, Tensor):
        _scattered(tracer, a["self"], source, a["dim"])
        _scattered(tracer, source, a["index"], a["dim"])
    else:  # one number for all
        _scattered(tracer, a["self"], a["index"], a["dim"])
    put(tracer, result, tracer.info(a["self"]).axes)


def _scattered(tracer: ChannelTracer, into: Tensor, source: Tensor, dim: int) -> None:
    """Join all dimensions but the one along which places are picked."""
    left, right = tracer.info(into), tracer.info(source)
    for place, (one, other) in enumerate(zip(left.axes, right.axes, strict=True)):
        if place == dim % into.dim():
            tracer.fix(one, "places of it are picked")
            tracer.fix(other, "places of it are picked")
        elif len(one.atoms) == len(other.atoms):
            tracer.atoms.join(one.atoms, other.atoms)
        else:
            raise ValueError("only whole rows")


@rule("index_select")
def _index_select(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info, dim = tracer.info(a["self"]), a["dim"] % result.dim()
    tracer.fix(info.axes[dim], "places of it are picked")
    fixed_axes(tracer, result, [None if n == dim else x for n, x in enumerate(info.axes)])


@rule("index")
def _index(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info, indices = tracer.info(a["self"]), list(a["indices"])
    if any(i is not None and i.dtype == torch.bool for i in indices):
        return _masked(tracer, a, result)
    indices += [None] * (len(info.axes) - len(indices))
    places = [n for n, i in enumerate(indices) if i is not None]
    for n in places:
        tracer.fix(info.axes[n], "places of it are picked")
        for axis in tracer.info(indices[n]).axes:
            tracer.fix(axis, "it picks places")
    # As in NumPy: what is picked stands where the first index did, or in front if a slice parts the indices.
    width = max(indices[n].dim() for n in places)
    together = places == list(range(places[0], places[-1] + 1))
    rest: list[Axis | None] = [x for n, x in enumerate(info.axes) if n not in places]
    at = places[0] if together else 0
    fixed_axes(tracer, result, [*rest[:at], *[None] * width, *rest[at:]])
    return None


@rule("index_put", "_index_put_impl")
def _index_put(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    axes: list[Axis | None] = list(tracer.info(a["self"]).axes)
    taken: list[int] = []
    dim = width = 0
    for index in a["indices"]:
        is_mask = index is not None and index.dtype == torch.bool
        dims = index.dim() if is_mask else 1
        if index is not None:
            taken += range(dim, dim + dims)
            width = max(width, 1 if is_mask else index.dim())
            for axis in (*axes[dim : dim + dims], *tracer.info(index).axes):
                if axis is not None:
                    tracer.fix(axis, "places of it are written")
        dim += dims
    rest = [axis for n, axis in enumerate(axes) if n not in taken]
    # Written values have the shape that reading would give, or one that broadcasts to it.
    at = taken[0] if taken == list(range(taken[0], taken[-1] + 1)) else 0
    written: list[Axis | None] = [*rest[:at], *[None] * width, *rest[at:]]
    for back, given in enumerate(reversed(tracer.info(a["values"]).axes), 1):
        axis = written[-back] if back <= len(written) else None
        if axis is not None and len(axis.atoms) == len(given.atoms):
            tracer.atoms.join(axis.atoms, given.atoms)
        elif len(given.atoms) > 1:
            tracer.fix(given, "places of it are written")
    put(tracer, result, tracer.info(a["self"]).axes)


def _masked(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    axes: list[Axis | None] = list(tracer.info(a["self"]).axes)
    given = [(n, i) for n, i in enumerate(a["indices"]) if i is not None]
    if len(given) != 1:
        return picked(tracer, a, result)
    place, mask = given[0]
    # A mask of n dimensions takes n, and gives one, as long as it has true places.
    for axis in (*axes[place : place + mask.dim()], *tracer.info(mask).axes):
        if axis is not None:
            tracer.fix(axis, "places of it are picked")
    fixed_axes(tracer, result, [*axes[:place], None, *axes[place + mask.dim() :]])
    return None


@rule("embedding")
def _embedding(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    weight, indices = tracer.info(a["weight"]), tracer.info(a["indices"])
    # Rows are a vocabulary, and the data hold their numbers; columns are channels as a layer makes them.
    tracer.fix(weight.axes[0], "it is looked up by index")
    if weight.source:
        tracer.made.append(weight.axes[1].atoms)
    put(tracer, result, [*indices.axes, weight.axes[1]])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    weight = tracer.info(a["weight"])
    tracer.fix(weight.axes[0], "it is looked up by index")
    if weight.source:
        tracer.made.append(weight.axes[1].atoms)
    bags, *rest = tensors_in(result)
    fixed_axes(tracer, bags, [None, weight.axes[1]])
    fixed_axes(tracer, rest)


@rule("constant_pad_nd")
def _pad(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    axes = list(tracer.info(a["self"]).axes)
    pad = list(a["pad"])
    for place in range(len(pad) // 2):
        before, after = pad[2 * place : 2 * place + 2]
        dim = len(axes) - 1 - place
        old = axes[dim]
        if before < 0 or after < 0:
            tracer.fix(old, "it is cropped")
        if before or after:
            # Zeros beside the channels, as in a residual shortcut without weights (He et al. 2016,
            # arXiv:1512.03385, option A): what reads them expects so many.
            kept = old.atoms[max(-before, 0) : len(old.atoms) - max(-after, 0)]
            reason = f"it is padding in {tracer.here}"
            ends = [tracer.atoms.fresh(max(size, 0), reason) for size in (before, after)]
            axes[dim] = Axis(np.concatenate([ends[0], kept, ends[1]]))
    put(tracer, result, axes)


@rule("unfold")
def _unfold(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info, dim = tracer.info(a["self"]), a["dimension"] % a["self"].dim()
    tracer.fix(info.axes[dim], "it is unfolded")
    fixed_axes(tracer, result, [None if n == dim else x for n, x in enumerate(info.axes)])


@rule("glu")
def _glu(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    axes = list(tracer.info(a["self"]).axes)
    dim = a.get("dim", -1)
    # a * sigmoid(b) (Dauphin et al. 2017, arXiv:1612.08083): a channel and its gate go together.
    half = len(axes[dim].atoms) // 2
    tracer.atoms.join(axes[dim].atoms[:half], axes[dim].atoms[half:])
    axes[dim] = Axis(axes[dim].atoms[:half], axes[dim].factors)
    put(tracer, result, axes)
