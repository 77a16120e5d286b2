"""How the dimensions of each aten operation's results come from those of its arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_accel.pruning.atoms import Atoms, Ids
from lightning_accel.pruning.flow import Axis, Flow, Info

Rule = Callable[[Flow, dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}


def follow(flow: Flow, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Apply the rule of `func`; fix all dimensions where there is none."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    bound = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
    rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    if rule is None:
        rule = _pointwise if torch.Tag.pointwise in func.tags else _unknown
    if rule is _unknown and _all(bound):
        flow.unknown.add(schema.name)
    rule(flow, bound, result)


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _all(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    return (
        [t for v in values for t in _all(v)]
        if isinstance(values, (list, tuple, type({}.values())))
        else []
    )


def _put(flow: Flow, result: Tensor, axes: Sequence[Axis], source: str = "") -> None:
    assert tuple(len(a.atoms) for a in axes) == tuple(result.shape), (axes, result.shape)
    flow.infos[result] = Info(tuple(axes), source)


def _still(flow: Flow, result: Any, axes: Sequence[Axis | None] = ()) -> None:
    """Give `result` these axes; the missing ones are fixed."""
    for tensor in _all(result):
        known = [*axes, *[None] * tensor.dim()][: tensor.dim()]
        reason = f"it is made anew in the forward of {flow.here}"
        _put(
            flow,
            tensor,
            [
                axis if axis is not None and len(axis.atoms) == n else flow.still(n, reason)
                for axis, n in zip(known, tensor.shape, strict=True)
            ],
        )


# -- elementwise ------------------------------------------------------------------------------------


def _pointwise(flow: Flow, a: dict[str, Any], result: Any) -> None:
    inputs = [flow.info(t) for t in _all(a)]
    for tensor in _all(result):
        axes = _broadcast(flow, inputs, tensor.shape)
        if len(axes) == tensor.dim():
            _put(flow, tensor, axes)


def _broadcast(flow: Flow, inputs: Sequence[Info], shape: Sequence[int]) -> list[Axis]:
    axes = []
    for back in range(len(shape), 0, -1):
        met = [i.axes[-back] for i in inputs if len(i.axes) >= back]
        met = [x for x in met if len(x.atoms) == shape[-back]]
        if not met:
            met = [flow.still(shape[-back], "it is broadcast")]
        if shape[-back] > 1:
            for other in met[1:]:
                flow.atoms.join(met[0].atoms, other.atoms)
        axes.append(Axis(met[0].atoms, frozenset().union(*(x.factors for x in met))))
    return axes


RULES.update(
    dict.fromkeys(
        (
            "where masked_fill copy _prelu_kernel clamp clamp_min clamp_max lerp addcmul addcdiv "
            "bernoulli complex polar native_dropout fill zero uniform normal random exponential "
            "bitwise_and bitwise_or bitwise_not logical_and logical_or logical_not isin nan_to_num "
            "hardswish log_sigmoid_forward rrelu_with_noise rsub"
        ).split(),
        _pointwise,
    )
)


@_rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous")
@_rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
@_rule("_conj", "resolve_conj", "as_strided")
def _same(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    (info, *_) = (flow.info(t) for t in _all(a))
    if tuple(result.shape) == tuple(len(x.atoms) for x in info.axes):
        _put(flow, result, info.axes, info.source)
    else:
        _unknown(flow, a, result)


@_rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty")
@_rule("new_full", "empty_strided", "new_empty_strided")
def _constant(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _put(flow, result, [Axis(flow.atoms.fresh(n)) for n in result.shape])


def _unknown(flow: Flow, a: dict[str, Any], result: Any) -> None:
    for tensor in _all(a):
        for axis in flow.info(tensor).axes:
            flow.fix(axis, "an operation without a rule reads it")
    known = {id(t) for t in _all(a)}
    _still(flow, [t for t in _all(result) if id(t) not in known])


# -- shapes -----------------------------------------------------------------------------------------


@_rule("view", "_unsafe_view", "reshape", "_reshape_alias")
def _reshape(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    if 0 in result.shape or not isinstance(a.get("size", ()), (list, tuple)):
        return (
            _same(flow, a, result) if a["self"].shape == result.shape else _unknown(flow, a, result)
        )
    flags = flow.adjustable
    flags = flags if flags is not None and len(flags) == result.dim() else [True] * result.dim()
    axes: list[Axis | None] = [None] * result.dim()
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
            merged = _merge(flow, old)
            places = [n for n, _ in new]
            factors = _split(
                flow, merged, [s for _, s in new], [flags[n] for n in places], (flow.step, part)
            )
        for (n, _), axis in zip(new, factors, strict=True):
            axes[n] = axis
        part += 1
    ones = iter([x for x in info.axes if len(x.atoms) == 1])
    full = [axis or next(ones, None) or flow.still(1, "it has size 1") for axis in axes]
    _put(flow, result, full, info.source)


def _merge(flow: Flow, axes: Sequence[Axis]) -> Axis:
    if len(axes) == 1:
        return axes[0]
    sizes = [len(x.atoms) for x in axes]
    free = [n for n, x in enumerate(axes) if flow.atoms.is_free(x.atoms)]
    factors = frozenset().union(*(x.factors for x in axes))
    if not free:
        return Axis(np.full(math.prod(sizes), axes[0].atoms[0]), factors)
    chosen = max(free, key=lambda n: len(np.unique(flow.atoms.find(axes[n].atoms))))
    for n in free:
        if n != chosen:
            flow.fix(axes[n], "it is merged with another dimension")
    shape = [size if n == chosen else 1 for n, size in enumerate(sizes)]
    return Axis(np.broadcast_to(axes[chosen].atoms.reshape(shape), sizes).reshape(-1), factors)


def _split(
    flow: Flow, axis: Axis, sizes: Sequence[int], flags: Sequence[bool], site: tuple[int, int]
) -> list[Axis]:
    if len(sizes) == 1:
        return [axis]
    grid = flow.atoms.find(axis.atoms).reshape(sizes)
    varying = [n for n in range(len(sizes)) if not (grid == grid.take([0], axis=n)).all()]
    flow.splits[site] = tuple(varying)
    reason = f"a split in the forward of {flow.here} keeps this part whole"
    factors = [
        Axis(np.full(size, flow.atoms.fresh(1, reason)[0]), frozenset({(site, n)}))
        for n, size in enumerate(sizes)
    ]
    if not flow.atoms.is_free(axis.atoms):
        return factors
    able = [n for n in varying if flags[n]]
    if not able:
        flow.atoms.fix(axis.atoms, f"sizes are written in the code of {flow.here}")
        return factors
    chosen = flow.live.get(site, -1)
    if chosen not in able:
        chosen = max(able, key=lambda n: sizes[n])
    lines = np.moveaxis(grid, chosen, 0).reshape(sizes[chosen], -1)
    flow.atoms.join(lines[:, :1], lines)
    if flow.live.get(site) == chosen:
        flow.headed.append(lines[:, 0])
    factors[chosen] = Axis(lines[:, 0], frozenset({(site, chosen)}))
    return factors


@_rule("permute")
def _permute(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    _put(flow, result, [info.axes[d] for d in a["dims"]], info.source)


@_rule("transpose", "swapaxes")
def _transpose(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    axes = list(info.axes)
    axes[a["dim0"]], axes[a["dim1"]] = axes[a["dim1"]], axes[a["dim0"]]
    _put(flow, result, axes, info.source)


@_rule("t", "numpy_T", "mT")
def _t(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    _put(flow, result, info.axes[::-1], info.source)


@_rule("unsqueeze")
def _unsqueeze(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    axes = list(info.axes)
    axes.insert(a["dim"] % result.dim(), flow.still(1, "it has size 1"))
    _put(flow, result, axes, info.source)


@_rule("squeeze")
def _squeeze(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    dims = a.get("dim", list(range(len(info.axes))))
    dims = {d % max(len(info.axes), 1) for d in ([dims] if isinstance(dims, int) else dims)}
    axes = [x for n, x in enumerate(info.axes) if n not in dims or len(x.atoms) != 1]
    _put(flow, result, axes, info.source)


@_rule("expand")
def _expand(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    flags = flow.adjustable
    flags = flags if flags is not None and len(flags) == result.dim() else [True] * result.dim()
    ahead = result.dim() - len(info.axes)
    axes = []
    for n, size in enumerate(result.shape):
        old = info.axes[n - ahead] if n >= ahead else None
        if old is not None and len(old.atoms) == size:
            axes.append(old)
        elif flags[n]:
            axes.append(Axis(flow.atoms.fresh(size), old.factors if old else frozenset()))
        else:
            axes.append(flow.still(size, "its size is written in the code"))
    _put(flow, result, axes)


@_rule("repeat")
def _repeat(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    ahead = result.dim() - len(info.axes)
    axes = []
    for n, size in enumerate(result.shape):
        old = info.axes[n - ahead] if n >= ahead else None
        if old is None or (len(old.atoms) == 1 and size > 1):
            axes.append(flow.still(size, f"it is repeated in {flow.here}"))
        else:
            axes.append(Axis(np.tile(old.atoms, size // max(len(old.atoms), 1)), old.factors))
    _put(flow, result, axes)


@_rule("slice")
def _slice(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    dim, step = a.get("dim", 0), a.get("step", 1)
    start, end = a.get("start"), a.get("end")
    axis = info.axes[dim]
    if step != 1:
        flow.fix(axis, "it is sliced with a step")
    axes = list(info.axes)
    axes[dim] = Axis(axis.atoms[start:end:step], axis.factors)
    _put(flow, result, axes, info.source)


@_rule("select")
def _select(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    axes = list(info.axes)
    flow.fix(axes.pop(a["dim"]), "one place of it is selected")
    _put(flow, result, axes, info.source)


@_rule("unbind")
def _unbind(flow: Flow, a: dict[str, Any], result: Any) -> None:
    info = flow.info(a["self"])
    axes = list(info.axes)
    flow.fix(axes.pop(a.get("dim", 0)), "it is unbound")
    for tensor in result:
        _put(flow, tensor, axes, info.source)


@_rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk")
@_rule("unsafe_chunk")
def _pieces(flow: Flow, a: dict[str, Any], result: Any) -> None:
    info, start = flow.info(a["self"]), 0
    dim = a.get("dim", 0)
    for tensor in result:
        axes, size = list(info.axes), tensor.shape[dim]
        axes[dim] = Axis(axes[dim].atoms[start : start + size], axes[dim].factors)
        _put(flow, tensor, axes, info.source)
        start += size


@_rule("cat", "concat")
def _cat(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    infos = [flow.info(t) for t in a["tensors"] if tuple(t.shape) != (0,)]
    dim = a.get("dim", 0) % max(result.dim(), 1)
    axes = []
    for n in range(result.dim()):
        if n == dim:
            axes.append(Axis(np.concatenate([i.axes[n].atoms for i in infos])))
        else:
            for other in infos[1:]:
                flow.atoms.join(infos[0].axes[n].atoms, other.axes[n].atoms)
            axes.append(infos[0].axes[n])
    _put(flow, result, axes)


@_rule("stack")
def _stack(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    infos = [flow.info(t) for t in a["tensors"]]
    axes = _broadcast(flow, infos, a["tensors"][0].shape)
    axes.insert(a.get("dim", 0) % result.dim(), flow.still(len(infos), "it is stacked"))
    _put(flow, result, axes)


@_rule("flip")
def _flip(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    dims = {d % result.dim() for d in a["dims"]}
    _put(
        flow,
        result,
        [
            Axis(x.atoms[::-1].copy(), x.factors) if n in dims else x
            for n, x in enumerate(info.axes)
        ],
    )


@_rule("roll")
def _roll(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _fixing(flow, a["self"], a.get("dims") or range(result.dim()), "it is rolled", result)


@_rule(
    "_softmax", "_log_softmax", "_safe_softmax", "softmax", "cumsum", "cumprod", "sort", "argsort"
)
@_rule("logcumsumexp", "cummax", "cummin")
def _across(flow: Flow, a: dict[str, Any], result: Any) -> None:
    _fixing(flow, a["self"], [a.get("dim", -1)], "its channels compete", result)


@_rule("tril", "triu")
def _triangle(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _fixing(flow, a["self"], [-1, -2], "it is a triangle", result)


@_rule("_fft_r2c", "_fft_c2r", "_fft_c2c")
def _fft(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _fixing(flow, a["self"], a["dim"], "a Fourier transform runs over it", result)


def _fixing(flow: Flow, tensor: Tensor, dims: Any, what: str, result: Any) -> None:
    info = flow.info(tensor)
    for dim in dims:
        if info.axes:
            flow.fix(info.axes[dim], what)
    _still(flow, result, info.axes)


@_rule("topk", "kthvalue", "gather")
def _picked(flow: Flow, a: dict[str, Any], result: Any) -> None:
    for tensor in _all(a):
        for axis in flow.info(tensor).axes:
            flow.fix(axis, "places of it are picked")
    _still(flow, result)


@_rule("index_select")
def _index_select(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info, dim = flow.info(a["self"]), a["dim"] % result.dim()
    flow.fix(info.axes[dim], "places of it are picked")
    _still(flow, result, [None if n == dim else x for n, x in enumerate(info.axes)])


@_rule("index")
def _index(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info, indices = flow.info(a["self"]), list(a["indices"])
    if any(i is not None and i.dtype == torch.bool for i in indices):
        return _picked(flow, a, result)
    indices += [None] * (len(info.axes) - len(indices))
    places = [n for n, i in enumerate(indices) if i is not None]
    for n in places:
        flow.fix(info.axes[n], "places of it are picked")
        for axis in flow.info(indices[n]).axes:
            flow.fix(axis, "it picks places")
    width = max(indices[n].dim() for n in places)
    together = places == list(range(places[0], places[-1] + 1))
    rest: list[Axis | None] = [x for n, x in enumerate(info.axes) if n not in places]
    at = places[0] if together else 0
    _still(flow, result, [*rest[:at], *[None] * width, *rest[at:]])
    return None


@_rule("embedding")
def _embedding(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    weight, indices = flow.info(a["weight"]), flow.info(a["indices"])
    flow.fix(weight.axes[0], "it is looked up by index")
    if weight.source:
        flow.made.append(weight.axes[1].atoms)
    _put(flow, result, [*indices.axes, weight.axes[1]])


@_rule("constant_pad_nd")
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
            kept = old.atoms[max(-before, 0) : len(old.atoms) - max(-after, 0)]
            reason = f"it is padding in {flow.here}"
            ends = [flow.atoms.fresh(max(size, 0), reason) for size in (before, after)]
            axes[dim] = Axis(np.concatenate([ends[0], kept, ends[1]]))
    _put(flow, result, axes)


# -- reductions -------------------------------------------------------------------------------------


@_rule(
    "sum", "mean", "amax", "amin", "max", "min", "any", "all", "var", "std", "var_mean", "std_mean"
)
@_rule("linalg_vector_norm", "norm", "prod", "logsumexp", "argmax", "argmin", "count_nonzero")
def _reduce(flow: Flow, a: dict[str, Any], result: Any) -> None:
    if "other" in a:
        return _pointwise(flow, a, result)
    info = flow.info(a["self"])
    dims = a.get("dim")
    dims = range(len(info.axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % max(len(info.axes), 1) for d in (dims if len(dims) else range(len(info.axes)))}
    if a.get("keepdim"):
        axes = [flow.still(1, "it is reduced") if n in gone else x for n, x in enumerate(info.axes)]
    else:
        axes = [x for n, x in enumerate(info.axes) if n not in gone]
    for tensor in _all(result):
        if tensor.dim() == len(axes):
            _put(flow, tensor, axes)
        else:
            _still(flow, tensor)
    return None


for _name in ("prod", "logsumexp", "argmax", "argmin"):
    RULES.pop(_name)


@_rule("logsumexp", "prod", "argmax", "argmin")
def _compete(flow: Flow, a: dict[str, Any], result: Any) -> None:
    info = flow.info(a["self"])
    dims = a.get("dim")
    dims = range(len(info.axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    for dim in dims:
        flow.fix(info.axes[dim], "its channels compete")
    _reduce(flow, a, result)


# -- spatial operations -----------------------------------------------------------------------------


def _spatial(last: int) -> Rule:
    def rule(flow: Flow, a: dict[str, Any], result: Any) -> None:
        info = flow.info(a["self"] if "self" in a else a["input"])
        for axis in info.axes[-last:]:
            flow.fix(axis, "it is a spatial dimension")
        _still(flow, result, info.axes[:-last])

    return rule


for _name in (
    "max_pool{}d_with_indices avg_pool{}d _adaptive_avg_pool{}d adaptive_avg_pool{}d "
    "adaptive_max_pool{}d max_pool{}d reflection_pad{}d replication_pad{}d upsample_nearest{}d "
    "_upsample_nearest_exact{}d fractional_max_pool{}d upsample_bilinear{}d upsample_linear{}d "
    "upsample_trilinear{}d upsample_bicubic{}d _upsample_bicubic{}d_aa _upsample_bilinear{}d_aa "
    "grid_sampler_{}d quantized_max_pool{}d"
).split():
    for _last in (1, 2, 3):
        RULES[_name.format(_last)] = _spatial(_last)


@_rule("glu")
def _glu(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    axes = list(flow.info(a["self"]).axes)
    dim = a.get("dim", -1)
    half = len(axes[dim].atoms) // 2
    flow.atoms.join(axes[dim].atoms[:half], axes[dim].atoms[half:])
    axes[dim] = Axis(axes[dim].atoms[:half], axes[dim].factors)
    _put(flow, result, axes)


@_rule("im2col")
def _im2col(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    channels = info.axes[-3]
    for axis in info.axes[-2:]:
        flow.fix(axis, "it is a spatial dimension")
    times = result.shape[-2] // len(channels.atoms)
    _still(flow, result, [*info.axes[:-3], Axis(np.repeat(channels.atoms, times)), None])


@_rule("col2im")
def _col2im(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    channels = result.shape[-3]
    grid = info.axes[-2].atoms.reshape(channels, -1)
    flow.atoms.join(grid[:, :1], grid)
    _still(flow, result, [*info.axes[:-2], Axis(grid[:, 0]), None, None])


@_rule("pixel_shuffle")
def _pixel_shuffle(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    grid = info.axes[-3].atoms.reshape(result.shape[-3], -1)
    flow.atoms.join(grid[:, :1], grid)
    _still(flow, result, [*info.axes[:-3], Axis(grid[:, 0]), None, None])


@_rule("pixel_unshuffle")
def _pixel_unshuffle(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    times = result.shape[-3] // len(info.axes[-3].atoms)
    axis = Axis(np.repeat(info.axes[-3].atoms, times))
    _still(flow, result, [*info.axes[:-3], axis, None, None])


@_rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    grid = info.axes[1].atoms.reshape(a["groups"], -1)
    flow.atoms.join(grid[:1], grid)
    axes = list(info.axes)
    axes[1] = Axis(grid.T.reshape(-1))
    _put(flow, result, axes)


@_rule("unfold")
def _unfold(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info, dim = flow.info(a["self"]), a["dimension"] % a["self"].dim()
    flow.fix(info.axes[dim], "it is unfolded")
    _still(flow, result, [None if n == dim else x for n, x in enumerate(info.axes)])


@_rule("view_as_real")
def _view_as_real(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _still(flow, result, flow.info(a["self"]).axes)


@_rule("view_as_complex")
def _view_as_complex(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    info = flow.info(a["self"])
    flow.fix(info.axes[-1], "it holds complex parts")
    _put(flow, result, info.axes[:-1])


# -- products ---------------------------------------------------------------------------------------


def _contract(flow: Flow, left: Info, right: Info, a: Axis, b: Axis) -> None:
    flow.atoms.join(a.atoms, b.atoms)
    for info, axis in ((left, a), (right, b)):
        if info.source:
            flow.read.append(axis.atoms)


def _makes(flow: Flow, info: Info, axis: Axis) -> None:
    if info.source:
        flow.made.append(axis.atoms)


@_rule("mm", "matmul")
def _mm(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _matrix(flow, a["self"], a["mat2"], result)


@_rule("addmm")
def _addmm(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _matrix(flow, a["mat1"], a["mat2"], result, a["self"])


def _matrix(
    flow: Flow, one: Tensor, two: Tensor, result: Tensor, bias: Tensor | None = None
) -> None:
    left, right = flow.info(one), flow.info(two)
    _contract(flow, left, right, left.axes[1], right.axes[0])
    _makes(flow, left, left.axes[0])
    _makes(flow, right, right.axes[1])
    axes = [left.axes[0], right.axes[1]]
    flow.multiply(*axes, left.axes[1])
    _put(flow, result, axes)
    if bias is not None:
        _broadcast(flow, [flow.info(result), flow.info(bias)], result.shape)


@_rule("linear")
def _linear(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    left, weight = flow.info(a["input"]), flow.info(a["weight"])
    _contract(flow, left, weight, left.axes[-1], weight.axes[1])
    _makes(flow, weight, weight.axes[0])
    flow.multiply(*left.axes, weight.axes[0])
    _put(flow, result, [*left.axes[:-1], weight.axes[0]])
    if a.get("bias") is not None:
        flow.atoms.join(weight.axes[0].atoms, flow.info(a["bias"]).axes[0].atoms)


@_rule("bmm")
def _bmm(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    left, right = flow.info(a["self"]), flow.info(a["mat2"])
    for axis in (left.axes[0], right.axes[0]):
        flow.batched.update(dict(axis.factors))
    flow.atoms.join(left.axes[0].atoms, right.axes[0].atoms)
    _contract(flow, left, right, left.axes[2], right.axes[1])
    axes = [left.axes[0], left.axes[1], right.axes[2]]
    flow.multiply(*axes, left.axes[2])
    _put(flow, result, axes)


@_rule("baddbmm")
def _baddbmm(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    _bmm(flow, {"self": a["batch1"], "mat2": a["batch2"]}, result)
    _broadcast(flow, [flow.info(result), flow.info(a["self"])], result.shape)


@_rule("mv", "addmv")
def _mv(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    left, right = flow.info(a.get("mat", a["self"])), flow.info(a["vec"])
    _contract(flow, left, right, left.axes[1], right.axes[0])
    flow.multiply(*left.axes)
    _put(flow, result, [left.axes[0]])


@_rule("dot", "vdot")
def _dot(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    left, right = flow.info(a["self"]), flow.info(a["tensor" if "tensor" in a else "other"])
    flow.atoms.join(left.axes[0].atoms, right.axes[0].atoms)
    _put(flow, result, [])


@_rule("convolution", "convolution_overrideable", "_convolution")
def _convolution(flow: Flow, a: dict[str, Any], result: Tensor) -> None:
    x, weight = flow.info(a["input"]), flow.info(a["weight"])
    transposed, groups = a["transposed"], a["groups"]
    spatial = len(weight.axes) - 2
    reason = "it is a spatial dimension"
    for axis in (*weight.axes[2:], *x.axes[-spatial:]):
        flow.fix(axis, reason)
    rows, columns = weight.axes[:2]
    source = x.axes[-spatial - 1]
    if groups == 1:
        inner, outer = (rows, columns) if transposed else (columns, rows)
        _contract(flow, x, weight, source, inner)
        flow.groups = None
    else:
        inner, outer = _grouped(flow, source, rows, columns, groups, transposed)
        if weight.source and not transposed:
            flow.read.append(columns.atoms)
    if weight.source:
        flow.made.append((columns if transposed and groups == 1 else rows).atoms)
    if a["bias"] is not None:
        flow.atoms.join(outer.atoms, flow.info(a["bias"]).axes[0].atoms)
    axes: list[Axis | None] = [*x.axes[: -spatial - 1], outer]
    _still(flow, result, axes)
    over = x.axes if transposed else flow.info(result).axes
    flow.multiply(*over, columns if groups > 1 or not transposed else outer, times=_kernel(weight))


def _kernel(weight: Info) -> int:
    return math.prod(len(x.atoms) for x in weight.axes[2:])


def _grouped(
    flow: Flow, source: Axis, rows: Axis, columns: Axis, groups: int, transposed: bool
) -> tuple[Axis, Axis]:
    """Join what a grouped convolution needs; return its input's and its output's channels."""
    into = source.atoms.reshape(groups, -1)
    if transposed:
        flow.atoms.join(into, rows.atoms.reshape(groups, -1))
        outer = flow.atoms.fresh(groups * len(columns.atoms))
    else:
        outer = rows.atoms
    out = outer.reshape(groups, -1)
    if _by_groups(flow, into, out):
        flow.atoms.join(into[:, :1], into)
        flow.atoms.join(into[:, :1], out)
        flow.atoms.fix(columns.atoms, "the groups of a convolution stay whole")
        flow.groups = into[:, 0]
    else:
        flow.atoms.join(into[:1], into)
        flow.atoms.join(out[:1], out)
        flow.atoms.join((out if transposed else into)[0], columns.atoms)
        flow.groups = None
    return source, Axis(outer)


def _by_groups(flow: Flow, into: Ids, out: Ids) -> bool:
    """Whether whole groups go, rather than the same places of every group: what leaves more choice."""
    if not flow.groups_adjustable:
        return False
    if into.shape[1] == 1:
        return True
    if flow.atoms.is_fixed(into).any() or flow.atoms.is_fixed(out).any():
        return False
    both = np.concatenate([into, out], axis=1)
    return _parts(flow, both[:, :1], both) > _parts(flow, both[:1], both)


def _parts(flow: Flow, one: Ids, other: Ids) -> int:
    """Return into how many parts `other` falls once `one` is joined to it."""
    roots = flow.atoms.find(other)
    known, places = np.unique(roots, return_inverse=True)
    trial = Atoms()
    trial.fresh(len(known))
    labels = places.reshape(other.shape)
    first = np.searchsorted(known, flow.atoms.find(one))
    trial.join(first, labels)
    return len(np.unique(trial.find(labels)))


# -- norms ------------------------------------------------------------------------------------------


@_rule("native_layer_norm", "_fused_rms_norm", "layer_norm", "rms_norm")
def _layer_norm(flow: Flow, a: dict[str, Any], result: Any) -> None:
    x = flow.info(a["input"])
    for key in ("weight", "bias"):
        if a.get(key) is not None:
            own = flow.info(a[key])
            for axis, other in zip(x.axes[-len(own.axes) :], own.axes, strict=True):
                flow.atoms.join(axis.atoms, other.atoms)
    first, *rest = _all(result)
    _put(flow, first, x.axes)
    _still(flow, rest, x.axes)


@_rule("native_group_norm")
def _group_norm(flow: Flow, a: dict[str, Any], result: Any) -> None:
    x = flow.info(a["input"])
    _channelwise(flow, a, x.axes[1], ("weight", "bias"))
    groups = a["group"]
    grid = x.axes[1].atoms.reshape(groups, -1)
    flow.groups = None
    if _by_groups(flow, grid, grid):
        flow.atoms.join(grid[:, :1], grid)
        flow.groups = grid[:, 0]
    elif groups > 1:
        flow.atoms.join(grid[:1], grid)
    first, *rest = _all(result)
    _put(flow, first, x.axes)
    _still(flow, rest, x.axes[:1])


@_rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training")
@_rule("cudnn_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update", "miopen_batch_norm")
@_rule("batch_norm_elemt")
def _batch_norm(flow: Flow, a: dict[str, Any], result: Any) -> None:
    x = flow.info(a["input"])
    _channelwise(flow, a, x.axes[1], ("weight", "bias", "running_mean", "running_var", "mean"))
    first, *rest = _all(result)
    _put(flow, first, x.axes)
    _still(flow, rest, [x.axes[1]])


def _channelwise(flow: Flow, a: dict[str, Any], channels: Axis, keys: Sequence[str]) -> None:
    for key in keys:
        if isinstance(a.get(key), Tensor):
            flow.atoms.join(channels.atoms, flow.info(a[key]).axes[0].atoms)


@_rule("_weight_norm_interface")
def _weight_norm(flow: Flow, a: dict[str, Any], result: Any) -> None:
    v, g, dim = flow.info(a["v"]), flow.info(a["g"]), a.get("dim", 0)
    flow.atoms.join(v.axes[dim].atoms, g.axes[dim].atoms)
    weight, *rest = _all(result)
    _put(flow, weight, v.axes, v.source)
    _still(flow, rest)
