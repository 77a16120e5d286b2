"""The table of rules, and what rules have in common.

A rule gives the results of one aten operation their dimensions, and joins or fixes those of its
arguments. `a` holds the arguments by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.pruning.trace.channel_tracer import Axis, ChannelTracer, Info

Rule = Callable[[ChannelTracer, dict[str, Any], Any], None]
RULES: dict[str, Rule] = {}

_MISFIT = (AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError)


def follow(tracer: ChannelTracer, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Apply the rule of `func`; fix all dimensions where there is none, or where it does not fit."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    tracer.operation = name
    # The dispatcher leaves out arguments at their default, so rules name torch's defaults themselves.
    bound = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
    # `copy_` has the rule of `copy`: its result is its own argument, and gets its axes anew.
    known = RULES.get(name) or RULES.get(name.rstrip("_"))
    # torch tags what works place by place; with that, most of some 2,000 operations need no rule.
    if known is None and torch.Tag.pointwise in func.tags:
        known = pointwise
    if known is not None:
        try:
            return known(tracer, bound, result)
        except _MISFIT:
            pass  # an overload that the rule does not know: safe, because all of it is fixed
    if tensors_in(bound):
        tracer.unknown.add(schema.name)
    return unknown(tracer, bound, result)


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def tensors_in(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    return (
        [t for v in values for t in tensors_in(v)]
        if isinstance(values, (list, tuple, type({}.values())))
        else []
    )


def put(tracer: ChannelTracer, result: Tensor, axes: Sequence[Axis], source: str = "") -> None:
    # A rule that does not fit the result must fail here, so that `follow` fixes everything.
    assert tuple(len(a.atoms) for a in axes) == tuple(result.shape), (axes, result.shape)
    tracer.infos[result] = Info(tuple(axes), source)


def fixed_axes(tracer: ChannelTracer, result: Any, axes: Sequence[Axis | None] = ()) -> None:
    """Give `result` these axes; the missing ones are fixed."""
    for tensor in tensors_in(result):
        known = [*axes, *[None] * tensor.dim()][: tensor.dim()]
        reason = f"it is made anew in the forward of {tracer.here}"
        put(
            tracer,
            tensor,
            [
                axis if axis is not None and len(axis.atoms) == n else tracer.still(n, reason)
                for axis, n in zip(known, tensor.shape, strict=True)
            ],
        )


def pointwise(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    inputs = [tracer.info(t) for t in tensors_in(a)]
    for tensor in tensors_in(result):
        axes = broadcast(tracer, inputs, tensor.shape)
        if len(axes) == tensor.dim():
            put(tracer, tensor, axes, _source(inputs, tensor.shape))


def _source(inputs: Sequence[Info], shape: Sequence[int]) -> str:
    """Return the parameter of which the result is a function: a scaled, masked or standardized weight."""
    # Weight standardization, spectral norm and masks compute a weight from a parameter: what a layer multiplies
    # by is then still that parameter, and makes or reads channels as it would. An activation of that shape
    # among the inputs makes it something else.
    whole = [i for i in inputs if [len(x.atoms) for x in i.axes] == list(shape)]
    return whole[0].source if whole and all(i.source for i in whole) else ""


def broadcast(tracer: ChannelTracer, inputs: Sequence[Info], shape: Sequence[int]) -> list[Axis]:
    axes = []
    # Broadcasting aligns shapes from their ends, as in NumPy.
    for back in range(len(shape), 0, -1):
        met = [i.axes[-back] for i in inputs if len(i.axes) >= back]
        # A dimension of size 1 is stretched: it goes with no place of the others.
        met = [x for x in met if len(x.atoms) == shape[-back]]
        if not met:
            met = [tracer.still(shape[-back], "it is broadcast")]
        if shape[-back] > 1:
            for other in met[1:]:
                tracer.atoms.join(met[0].atoms, other.atoms)
        # Heads are still heads after a mask, a scale or a rotation: the splits behind them are kept.
        axes.append(Axis(met[0].atoms, frozenset().union(*(x.factors for x in met))))
    return axes


def unknown(tracer: ChannelTracer, a: dict[str, Any], result: Any) -> None:
    for tensor in tensors_in(a):
        for axis in tracer.info(tensor).axes:
            tracer.fix(axis, f"an operation without a rule, `{tracer.operation}`, reads it")
    # A result that is an argument (written in place) has its axes, now fixed.
    known = {id(t) for t in tensors_in(a)}
    fixed_axes(tracer, [t for t in tensors_in(result) if id(t) not in known])


def fixing(tracer: ChannelTracer, tensor: Tensor, dims: Any, what: str, result: Any) -> None:
    info = tracer.info(tensor)
    for dim in dims:
        if info.axes:
            tracer.fix(info.axes[dim], what)
    fixed_axes(tracer, result, info.axes)


@rule("clone", "_to_copy", "detach", "alias", "lift_fresh", "lift_fresh_copy", "contiguous")
@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
@rule("_conj", "resolve_conj", "as_strided")
def same(tracer: ChannelTracer, a: dict[str, Any], result: Tensor) -> None:
    (info, *_) = (tracer.info(t) for t in tensors_in(a))
    # `as_strided` may lay a tensor out in any way; only where its shape stays it is taken for a plain view.
    if tuple(result.shape) == tuple(len(x.atoms) for x in info.axes):
        put(tracer, result, info.axes, info.source)
    else:
        unknown(tracer, a, result)
