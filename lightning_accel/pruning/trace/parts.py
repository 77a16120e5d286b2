"""Rules of operations that take dimensions apart, pick from them, and put them together."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accel.pruning.trace.flow import Axis, Flow
from lightning_accel.pruning.trace.rule import broadcast, fixing, put, rule, still, tensors_in


@rule("slice")
def _slice(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    dim, step = a.get("dim", 0), a.get("step", 1)
    start, end = a.get("start"), a.get("end")
    axis = info.axes[dim]
    # With a place gone before them, a step would hit other places than it did.
    if step != 1:
        flow.fix(axis, "it is sliced with a step")
    axes = list(info.axes)
    axes[dim] = Axis(axis.atoms[start:end:step], axis.factors)
    put(flow, result, axes, info.source)


@rule("select")
def _select(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    axes = list(info.axes)
    atoms, index = axes.pop(a["dim"]).atoms, int(a["index"])
    # It must stay, and so must all that it is counted from.
    flow.fix(Axis(atoms[: index + 1] if index >= 0 else atoms[index:]), "it is picked by number")
    put(flow, result, axes, info.source)


@rule("unbind")
def _unbind(flow: Flow, a: dict[str, Any], result: Any) -> None:
    info = flow.info(a["self"])
    axes = list(info.axes)
    flow.fix(axes.pop(a.get("dim", 0)), "it is unbound")
    for tensor in result:
        put(flow, tensor, axes, info.source)


@rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk")
@rule("unsafe_chunk")
def _pieces(flow: Flow, a: dict[str, Any], result: Any) -> None:
    info, start = flow.info(a["self"]), 0
    dim = a.get("dim", 0)
    for tensor in result:
        axes, size = list(info.axes), tensor.shape[dim]
        axes[dim] = Axis(axes[dim].atoms[start : start + size], axes[dim].factors)
        put(flow, tensor, axes, info.source)
        start += size


@rule("cat", "concat")
def _cat(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    # torch passes over empty tensors of one dimension, whatever the shape of the others (a legacy of its own).
    infos = [flow.info(t) for t in a["tensors"] if tuple(t.shape) != (0,)]
    dim = a.get("dim", 0) % max(result.dim(), 1)
    axes = []
    for n in range(result.dim()):
        if n == dim:
            # Side by side each part is free by itself, as in dense blocks (Huang et al. 2017,
            # arXiv:1608.06993).
            axes.append(Axis(np.concatenate([i.axes[n].atoms for i in infos])))
        else:
            for other in infos[1:]:
                flow.atoms.join(infos[0].axes[n].atoms, other.axes[n].atoms)
            axes.append(infos[0].axes[n])
    put(flow, result, axes)


@rule("stack")
def _stack(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    infos = [flow.info(t) for t in a["tensors"]]
    axes = broadcast(flow, infos, a["tensors"][0].shape)
    axes.insert(a.get("dim", 0) % result.dim(), flow.still(len(infos), "it is stacked"))
    put(flow, result, axes)


@rule("flip")
def _flip(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    dims = {d % result.dim() for d in a["dims"]}
    put(
        flow,
        result,
        [
            Axis(x.atoms[::-1].copy(), x.factors) if n in dims else x
            for n, x in enumerate(info.axes)
        ],
    )


@rule("topk")
def _topk(flow: Flow, a: dict[str, Any], result: Any) -> None:
    fixing(flow, a["self"], [a.get("dim", -1)], "places of it are picked", result)


@rule("gather")
def _gather(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _scattered(flow, a["self"], a["index"], a["dim"])
    # What comes out is as large as the index, whose places may all be used.
    pairs = zip(flow.info(a["index"]).axes, flow.info(a["self"]).axes, strict=True)
    put(flow, result, [Axis(x.atoms, x.factors | other.factors) for x, other in pairs])


@rule("kthvalue")
def picked(flow: Flow, a: dict[str, Any], result: Any) -> None:
    for tensor in tensors_in(a):
        for axis in flow.info(tensor).axes:
            flow.fix(axis, "places of it are picked")
    still(flow, result)


@rule("index_add", "index_copy", "index_reduce")
def _index_add(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _scattered(flow, a["self"], a["source"], a["dim"])
    put(flow, result, flow.info(a["self"]).axes)


@rule("scatter_add", "scatter_reduce", "scatter")
def _scatter(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    source = a.get("src")
    if isinstance(source, Tensor):
        _scattered(flow, a["self"], source, a["dim"])
        _scattered(flow, source, a["index"], a["dim"])
    else:  # one number for all
        _scattered(flow, a["self"], a["index"], a["dim"])
    put(flow, result, flow.info(a["self"]).axes)


def _scattered(flow: Flow, into: Tensor, source: Tensor, dim: int) -> None:
    """Join all dimensions but the one along which places are picked."""
    left, right = flow.info(into), flow.info(source)
    for place, (one, other) in enumerate(zip(left.axes, right.axes, strict=True)):
        if place == dim % into.dim():
            flow.fix(one, "places of it are picked")
            flow.fix(other, "places of it are picked")
        elif len(one.atoms) == len(other.atoms):
            flow.atoms.join(one.atoms, other.atoms)
        else:
            raise ValueError("only whole rows")


@rule("index_select")
def _index_select(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info, dim = flow.info(a["self"]), a["dim"] % result.dim()
    flow.fix(info.axes[dim], "places of it are picked")
    still(flow, result, [None if n == dim else x for n, x in enumerate(info.axes)])


@rule("index")
def _index(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info, indices = flow.info(a["self"]), list(a["indices"])
    if any(i is not None and i.dtype == torch.bool for i in indices):
        return _masked(flow, a, result)
    indices += [None] * (len(info.axes) - len(indices))
    places = [n for n, i in enumerate(indices) if i is not None]
    for n in places:
        flow.fix(info.axes[n], "places of it are picked")
        for axis in flow.info(indices[n]).axes:
            flow.fix(axis, "it picks places")
    # As in NumPy: what is picked stands where the first index did, or in front if a slice parts the indices.
    width = max(indices[n].dim() for n in places)
    together = places == list(range(places[0], places[-1] + 1))
    rest: list[Axis | None] = [x for n, x in enumerate(info.axes) if n not in places]
    at = places[0] if together else 0
    still(flow, result, [*rest[:at], *[None] * width, *rest[at:]])
    return None


@rule("index_put", "_index_put_impl")
def _index_put(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    axes: list[Axis | None] = list(flow.info(a["self"]).axes)
    taken: list[int] = []
    dim = width = 0
    for index in a["indices"]:
        is_mask = index is not None and index.dtype == torch.bool
        dims = index.dim() if is_mask else 1
        if index is not None:
            taken += range(dim, dim + dims)
            width = max(width, 1 if is_mask else index.dim())
            for axis in (*axes[dim : dim + dims], *flow.info(index).axes):
                if axis is not None:
                    flow.fix(axis, "places of it are written")
        dim += dims
    rest = [axis for n, axis in enumerate(axes) if n not in taken]
    # Written values have the shape that reading would give, or one that broadcasts to it.
    at = taken[0] if taken == list(range(taken[0], taken[-1] + 1)) else 0
    written: list[Axis | None] = [*rest[:at], *[None] * width, *rest[at:]]
    for back, given in enumerate(reversed(flow.info(a["values"]).axes), 1):
        axis = written[-back] if back <= len(written) else None
        if axis is not None and len(axis.atoms) == len(given.atoms):
            flow.atoms.join(axis.atoms, given.atoms)
        elif len(given.atoms) > 1:
            flow.fix(given, "places of it are written")
    put(flow, result, flow.info(a["self"]).axes)


def _masked(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    axes: list[Axis | None] = list(flow.info(a["self"]).axes)
    given = [(n, i) for n, i in enumerate(a["indices"]) if i is not None]
    if len(given) != 1:
        return picked(flow, a, result)
    place, mask = given[0]
    # A mask of n dimensions takes n, and gives one, as long as it has true places.
    for axis in (*axes[place : place + mask.dim()], *flow.info(mask).axes):
        if axis is not None:
            flow.fix(axis, "places of it are picked")
    still(flow, result, [*axes[:place], None, *axes[place + mask.dim() :]])
    return None


@rule("embedding")
def _embedding(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    weight, indices = flow.info(a["weight"]), flow.info(a["indices"])
    # Rows are a vocabulary, and the data hold their numbers; columns are channels as a layer makes them.
    flow.fix(weight.axes[0], "it is looked up by index")
    if weight.source:
        flow.made.append(weight.axes[1].atoms)
    put(flow, result, [*indices.axes, weight.axes[1]])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def _embedding_bag(flow: Flow, a: dict[str, Any], result: Any) -> None:
    weight = flow.info(a["weight"])
    flow.fix(weight.axes[0], "it is looked up by index")
    if weight.source:
        flow.made.append(weight.axes[1].atoms)
    bags, *rest = tensors_in(result)
    still(flow, bags, [None, weight.axes[1]])
    still(flow, rest)


@rule("constant_pad_nd")
def _pad(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    axes = list(flow.info(a["self"]).axes)
    pad = list(a["pad"])
    for place in range(len(pad) // 2):
        before, after = pad[2 * place : 2 * place + 2]
        dim = len(axes) - 1 - place
        old = axes[dim]
        if before < 0 or after < 0:
            flow.fix(old, "it is cropped")
        if before or after:
            # Zeros beside the channels, as in a residual shortcut without weights (He et al. 2016,
            # arXiv:1512.03385, option A): what reads them expects so many.
            kept = old.atoms[max(-before, 0) : len(old.atoms) - max(-after, 0)]
            reason = f"it is padding in {flow.here}"
            ends = [flow.atoms.fresh(max(size, 0), reason) for size in (before, after)]
            axes[dim] = Axis(np.concatenate([ends[0], kept, ends[1]]))
    put(flow, result, axes)


@rule("unfold")
def _unfold(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info, dim = flow.info(a["self"]), a["dimension"] % a["self"].dim()
    flow.fix(info.axes[dim], "it is unfolded")
    still(flow, result, [None if n == dim else x for n, x in enumerate(info.axes)])


@rule("glu")
def _glu(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    axes = list(flow.info(a["self"]).axes)
    dim = a.get("dim", -1)
    # a * sigmoid(b) (Dauphin et al. 2017, arXiv:1612.08083): a channel and its gate go together.
    half = len(axes[dim].atoms) // 2
    flow.atoms.join(axes[dim].atoms[:half], axes[dim].atoms[half:])
    axes[dim] = Axis(axes[dim].atoms[:half], axes[dim].factors)
    put(flow, result, axes)
