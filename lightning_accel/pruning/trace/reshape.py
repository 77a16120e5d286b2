"""Rules of operations that reorder, split and merge dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lightning_accel.pruning.trace.channel_tracer import Axis, ChannelTracer
from lightning_accel.pruning.trace.rule import put, rule, same, unknown


@rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _reshape(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    # Sizes tell which dimensions became which, and a size of 0 tells nothing; `view(dtype)` has no size at all.
    if 0 in result.shape or not isinstance(a.get("size", ()), (list, tuple)):
        return (
            same(tracer, a, result)
            if a["self"].shape == result.shape
            else unknown(tracer, a, result)
        )
    flags = tracer.adjustable
    flags = flags if flags is not None and len(flags) == result.dim() else [True] * result.dim()
    others = tracer.others if len(tracer.others) == result.dim() else [False] * result.dim()
    axes: list[Axis | None] = [None] * result.dim()
    # Memory is in row-major order, so from the left the fewest old dimensions and the fewest new ones with one
    # product are the same numbers. Dimensions of size 1 can be anywhere, and hold nothing.
    olds = [x for x in info.axes if len(x.atoms) != 1]
    news = [(n, size) for n, size in enumerate(result.shape) if size != 1]
    part = 0
    while news:
        old, new = [olds.pop(0)], [news.pop(0)]
        while (have := math.prod(len(x.atoms) for x in old)) != (
            want := math.prod(size for _, size in new)
        ):
            if have < want:
                old.append(olds.pop(0))
            else:
                new.append(news.pop(0))
        if len(old) == len(new) and [len(x.atoms) for x in old] == [size for _, size in new]:
            factors = old
        else:
            merged = _merge(tracer, old)
            places = [n for n, _ in new]
            given = [flags[n] for n in places], [others[n] for n in places]
            factors = _split(tracer, merged, [s for _, s in new], *given, (tracer.step, part))
        for (n, _), axis in zip(new, factors, strict=True):
            axes[n] = axis
        part += 1
    ones = iter([x for x in info.axes if len(x.atoms) == 1])
    full = [axis or next(ones, None) or tracer.still(1, "it has size 1") for axis in axes]
    put(tracer, result, full, info.source)


def _merge(tracer: ChannelTracer, axes: Sequence[Axis]) -> Axis:
    if len(axes) == 1:
        return axes[0]
    sizes = [len(x.atoms) for x in axes]
    free = [n for n, x in enumerate(axes) if tracer.atoms.is_free(x.atoms)]
    factors = frozenset().union(*(x.factors for x in axes))
    if not free:
        return Axis(np.full(math.prod(sizes), axes[0].atoms[0]), factors)
    # A place of the merged dimension has one atom, so only one of those merged can go on: the one of most
    # parts. A unit of it is all the places that it had beside the others.
    chosen = max(free, key=lambda n: len(np.unique(tracer.atoms.find(axes[n].atoms))))
    for n in free:
        if n != chosen:
            tracer.fix(axes[n], "it is merged with another dimension")
    shape = [size if n == chosen else 1 for n, size in enumerate(sizes)]
    return Axis(np.broadcast_to(axes[chosen].atoms.reshape(shape), sizes).reshape(-1), factors)


def _split(
    tracer: ChannelTracer,
    axis: Axis,
    sizes: Sequence[int],
    flags: Sequence[bool],
    others: Sequence[bool],
    site: tuple[int, int],
) -> list[Axis]:
    if len(sizes) == 1:
        return [axis]
    grid = tracer.atoms.find(axis.atoms).reshape(sizes)
    # Along a factor where all atoms are the same nothing is split: the places repeat what was merged before.
    varying = [n for n in range(len(sizes)) if not (grid == grid.take([0], axis=n)).all()]
    tracer.splits[site] = tuple(varying)
    free = tracer.atoms.is_free(axis.atoms)
    reason = "" if free else tracer.atoms.reason(axis.atoms)
    reason = reason or f"a split in the forward of {tracer.here} keeps this part whole"
    factors = [
        # A factor that is not chosen stays whole, but remembers the split: it may be the batch of a product.
        Axis(np.full(size, tracer.atoms.fresh(1, reason)[0]), axis.factors | {(site, n)})
        for n, size in enumerate(sizes)
    ]
    if not free:
        return factors
    if any(
        others[n] for n in varying
    ):  # pixels that are read as channels, which fits at one size only
        tracer.atoms.fix(axis.atoms, f"it is taken for another dimension in {tracer.here}")
        return factors
    # What the code writes as a number cannot shrink.
    able = [n for n in varying if flags[n]]
    if not able:
        tracer.atoms.fix(axis.atoms, f"sizes are written in the code of {tracer.here}")
        return factors
    chosen = tracer.live.get(site, -1)
    if chosen not in able:
        # Nothing is known of heads yet: the factor of most places leaves most choice.
        chosen = max(able, key=lambda n: sizes[n])
    lines = np.moveaxis(grid, chosen, 0).reshape(sizes[chosen], -1)
    # A head is all of its width, and a place of the width that place in all heads: a line goes as one.
    tracer.atoms.join(lines[:, :1], lines)
    if tracer.live.get(site) == chosen:
        tracer.headed.append(lines[:, 0])
    factors[chosen] = Axis(lines[:, 0], axis.factors | {(site, chosen)})
    return factors


@rule("permute")
def _permute(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    put(tracer, result, [info.axes[d] for d in a["dims"]], info.source)


@rule("transpose", "swapaxes")
def _transpose(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    axes = list(info.axes)
    axes[a["dim0"]], axes[a["dim1"]] = axes[a["dim1"]], axes[a["dim0"]]
    put(tracer, result, axes, info.source)


@rule("t", "numpy_T", "mT")
def _t(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    put(tracer, result, info.axes[::-1], info.source)


@rule("unsqueeze")
def _unsqueeze(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    axes = list(info.axes)
    axes.insert(a["dim"] % result.dim(), tracer.still(1, "it has size 1"))
    put(tracer, result, axes, info.source)


@rule("squeeze")
def _squeeze(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    dims = a.get("dim", list(range(len(info.axes))))
    dims = {d % max(len(info.axes), 1) for d in ([dims] if isinstance(dims, int) else dims)}
    axes = [x for n, x in enumerate(info.axes) if n not in dims or len(x.atoms) != 1]
    put(tracer, result, axes, info.source)


@rule("expand")
def _expand(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    flags = tracer.adjustable
    flags = flags if flags is not None and len(flags) == result.dim() else [True] * result.dim()
    ahead = result.dim() - len(info.axes)
    axes = []
    for n, size in enumerate(result.shape):
        old = info.axes[n - ahead] if n >= ahead else None
        if old is not None and len(old.atoms) == size:
            axes.append(old)
        # All places are the same number, so any may go: what they meet, and the size that was asked, decide.
        elif flags[n]:
            axes.append(Axis(tracer.atoms.fresh(size), old.factors if old else frozenset()))
        else:
            axes.append(tracer.still(size, "its size is written in the code"))
    put(tracer, result, axes)


@rule("repeat")
def _repeat(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    info = tracer.info(a["self"])
    ahead = result.dim() - len(info.axes)
    axes = []
    for n, size in enumerate(result.shape):
        old = info.axes[n - ahead] if n >= ahead else None
        if old is None or (len(old.atoms) == 1 and size > 1):
            axes.append(tracer.still(size, f"it is repeated in {tracer.here}"))
        else:
            # Each channel comes several times, and goes from every copy.
            axes.append(Axis(np.tile(old.atoms, size // max(len(old.atoms), 1)), old.factors))
    put(tracer, result, axes)
