"""The consumers' weights after a cut, solved anew so that they make what they made before.

A layer that reads pruned channels loses their part of its pre-activation. What is left is often
correlated with what is gone, so its weights (and its bias, where it has one) can make up for much of
it: least squares on calibration data, without labels (as in ThiNet, Luo et al. 2017, arXiv:1707.06342,
and channel pruning, He et al. 2017, arXiv:1707.06168):

    min_D  sum over samples || y - (W + D) x ||^2 + ridge || D ||^2.

y is the layer's output in the *dense* network, x its input in the *pruned* one, and layers are solved in
the order in which they run, each behind those already solved. So a layer also makes up for what earlier
layers could not, instead of adding to it. D is a change of the old weights: where the data say nothing
(few samples, equal channels) the ridge keeps the old values, not zero.

Names of tensors end in their dimensions: G groups of a layer, N positions, I inputs x kernel, O outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.arguments import positive
from lightning_accel.errors import AccelError, explain
from lightning_accel.exact import exact
from lightning_accel.progress import progress
from lightning_accel.pruning.groups import Group
from lightning_accel.pruning.layer_inputs import (
    AnotherWay,
    LayerInputs,
    Pairs,
    after,
    held_out,
    unfolded,
)
from lightning_accel.pruning.least_squares import Piece, improved
from lightning_accel.pruning.leftover import Leftover
from lightning_accel.pruning.reconstruction import evaluating
from lightning_accel.pruning.unfold import (
    by_block,
    like_weight,
    matrix,
    only_input,
    output_dim,
    patches,
    samples,
    why_unreadable,
)
from lightning_accel.surgery import Change, twin
from lightning_accel.surgery.call import Call, run
from lightning_accel.surgery.preserve import preserve_rng

RemovedUnits = Mapping[str, Sequence[int]]
_COMPUTES_MORE = "it gives out something else than its input times its weight, and its bias"


class Compensation(NamedTuple):
    """New values for a pruned model, and what they are worth on the calibration data.

    Attributes:
        values: Parameter name -> tensor of the pruned model's shape and dtype, to be copied into it.
        errors: Layer name -> squared error of its pre-activation before and after, summed over data.
        left_out: Layers that read pruned channels but were not solved, and why.
        output: Change of what the network gives out, before and after, relative to its size; on the batches that
            are held out where there are several.
    """

    values: dict[str, Tensor]
    errors: dict[str, tuple[float, float]]
    left_out: tuple[Change, ...]
    output: tuple[float, float]


@torch.no_grad()
def compensate(
    dense: nn.Module,
    cut: nn.Module,
    *,
    groups: Sequence[Group],
    gone: RemovedUnits,
    batches: Iterable[Sequence[Call]],
    ridge: float | None = None,
) -> Compensation:
    """Solve the weights of all layers that read pruned units; neither model is changed.

    Args:
        dense: A twin of the network before the cut.
        cut: The network after the cut, or a twin of it.
        groups: Groups of `dense`.
        gone: Group name -> removed units; that is how `cut` differs from `dense`.
        batches: The calls of each batch. They are run once; once more for each layer that a batch calls more
            than once, or in another order than the first batch does.
        ridge: Pull to the old weights, relative to the mean squared input; above 0. By default the best of a
            few on samples that are held out, and an output that does no better on those keeps its weights.

    Raises:
        ValueError: `ridge` is not positive, or there is no batch.
        AccelError: `cut` fails on the batches.

    >>> from lightning_accel.pruning.groups import Group, Member
    >>> dense = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 1))  # its two units are dependent
    >>> cut = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> cut[0].load_state_dict({k: v[:1] for k, v in dense[0].state_dict().items()})
    <All keys matched successfully>
    >>> unit = torch.tensor([[0], [1]])
    >>> group = Group("0", "channels", 2, (Member("1.weight", 1, "in", unit),), ("0",), 2)
    >>> x = torch.linspace(-1, 1, 16)[:, None]
    >>> batches = [[Call("", (x,), {})]]
    >>> found = compensate(
    ...     dense, cut, groups=[group], gone={"0": [1]}, batches=batches, ridge=1e-9
    ... )
    >>> cut.load_state_dict(found.values, strict=False).unexpected_keys
    []
    >>> torch.allclose(cut(x), dense(x), atol=1e-5)
    True
    """
    positive("ridge", ridge, none=True)
    steps = [list(calls) for calls in batches]
    if not steps:
        raise ValueError(explain("there is nothing to solve from", "no batch"))
    work = twin(cut)
    holders = Counter(id(p) for module in work.modules() for p in module._parameters.values())
    readers, left_out = _readers(work, groups, gone)
    values: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, float]] = {}
    with evaluating(dense), evaluating(work):
        _require_runs(work, steps[0])
        tried = [calls for i, calls in enumerate(steps) if held_out(1, i, len(steps))[1]] or steps
        leftover = Leftover(dense, tried, renews=False)
        before = leftover.of(work)
        order, others = _counted(dense, readers, steps[0])
        left_out += [Change(name, _COMPUTES_MORE) for name in sorted(others)]
        once = [name for name, count in order.items() if count == 1]
        with (
            LayerInputs(dense, work, steps, once) as seen,
            progress("making up for the cut", len(order)) as step,
        ):
            for name in order:
                step(name, by=1)
                kept = _kept_outputs(dense, name, groups, gone)
                layer, pairs = work.get_submodule(name), seen.pairs(name)
                bias = layer._parameters.get("bias")
                free = bias is not None and bias.requires_grad and holders[id(bias)] == 1
                found = _solve_layer(layer, pairs, len(steps), kept, ridge, free=int(free))
                if isinstance(found, str):
                    left_out.append(Change(name, found))
                    continue
                new, errors[name] = found
                for leaf, value in new.items():
                    parameter = work.get_submodule(name)._parameters[leaf]
                    assert parameter is not None
                    parameter.copy_(value)
                    values[f"{name}.{leaf}".lstrip(".")] = parameter.detach().clone()
        output = before, leftover.of(work)
    missed = set(readers) - set(errors) - {change.name for change in left_out}
    left_out += [Change(name, "its forward is not called") for name in sorted(missed)]
    return Compensation(values, errors, tuple(left_out), output)


def _require_runs(cut: nn.Module, calls: Sequence[Call]) -> None:
    """Raise where training calls what no cut can follow, such as a decoder on codes of the encoder's former size."""
    try:
        with preserve_rng():
            run(cut, calls)
    except Exception as error:  # whatever a forward may raise
        raise AccelError(
            "the smaller network fails on the calls of a training batch",
            f"{', '.join(call.name or 'the network' for call in calls)}: {type(error).__name__}: {error}",
            "let training call what the `example` is for, or pass compensate=False",
        ) from error


def _readers(
    cut: nn.Module, groups: Sequence[Group], gone: RemovedUnits
) -> tuple[dict[str, nn.Module], list[Change]]:
    """Return the layers to solve by name, and those that cannot be, with reasons."""
    holders: dict[int, set[int]] = {}
    for module in cut.modules():
        for parameter in module._parameters.values():
            holders.setdefault(id(parameter), set()).add(id(module))
    found: dict[str, nn.Module] = {}
    left_out: dict[str, Change] = {}
    for group in groups:
        for member in group.members if gone.get(group.name) else ():
            name = member.tensor.rpartition(".")[0]
            module = cut.get_submodule(name)
            if member.role != "in" or name in left_out or module in found.values():
                continue
            reason = why_unreadable(module, member)
            weight = module._parameters.get("weight")
            if not reason and weight is not None and len(holders[id(weight)]) > 1:
                reason = "another layer has the same weight"
            if not reason and weight is not None and not weight.requires_grad:
                reason = "its weight is frozen"
            if reason:
                left_out[name] = Change(name, reason)
            else:
                found[name] = module
    return found, list(left_out.values())


def _counted(
    dense: nn.Module, names: Iterable[str], calls: Sequence[Call]
) -> tuple[dict[str, int], set[str]]:
    """Count the calls of layers, in the order of their first ones; and name those that compute something else.

    A subclass with a forward of its own, or a hook on a layer, may do anything with its weight.
    """
    by_module = {dense.get_submodule(name): name for name in names}
    order: Counter[str] = Counter()
    others: set[str] = set()

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = by_module[module]
        order[name] += 1
        x = only_input(args, kwargs)
        if x is not None and isinstance(output, Tensor) and not _is_product(module, x, output):
            others.add(name)

    with after(by_module, note), preserve_rng():
        run(dense, calls)
    return {name: count for name, count in order.items() if name not in others}, others


def _is_product(layer: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether a layer gives out its input times its matrix, and its bias, as far as the first sample shows."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    x_GNI = patches(layer, samples(layer, x)[:1])
    rows_GOI = matrix(layer, weight)
    found_GNO = x_GNI @ rows_GOI.mT
    if bias is not None:
        found_GNO = found_GNO + exact(bias).view(rows_GOI.shape[:2])[:, None]
    y_GNO = by_block(layer, samples(layer, y)[:1])
    if found_GNO.shape != y_GNO.shape:
        return False
    scale = y_GNO.abs().amax() if y_GNO.numel() else 0.0
    # 2 %, so that a layer that computed in bfloat16 still is one.
    is_near = ((found_GNO - y_GNO).abs() <= 0.02 * scale).all()
    return bool(is_near or not y_GNO.isfinite().all())


def _kept_outputs(
    dense: nn.Module, name: str, groups: Sequence[Group], gone: RemovedUnits
) -> Tensor | None:
    """Return which outputs of a layer are left, or `None` if all are."""
    module = dense.get_submodule(name)
    dim = output_dim(module)
    weight = module._parameters["weight"]
    assert weight is not None
    keep = torch.ones(weight.shape[dim], dtype=torch.bool)
    for group in groups:
        for member in group.members:
            if member.tensor == f"{name}.weight".lstrip(".") and member.dim == dim:
                keep[member.positions[list(gone.get(group.name, ()))].flatten()] = False
    return None if keep.all() else keep.nonzero()[:, 0]


def _solve_layer(
    layer: nn.Module,
    pairs: Callable[[], Iterable[Pairs]],
    count: int,
    kept: Tensor | None,
    ridge: float | None,
    *,
    free: int,
) -> tuple[dict[str, Tensor], tuple[float, float]] | str:
    """Return new values and the error before and after, or why there are none."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    old_GOI = matrix(layer, weight)
    size = old_GOI.shape[:2]
    offset_GO = old_GOI.new_zeros(size) if bias is None else exact(bias).view(size)
    # A bias that may change is one more input, which is always 1.
    rows_GOI = torch.cat([old_GOI, offset_GO[..., None]], -1) if free else old_GOI

    def data() -> Iterator[Piece]:
        for x_GNI, y_GNO, is_held_out in unfolded(layer, pairs(), kept, count):
            if free:
                yield Piece(F.pad(x_GNI, (0, 1), value=1.0), y_GNO, is_held_out)
            else:
                yield Piece(x_GNI, y_GNO - offset_GO[:, None], is_held_out)

    def stored(rows: Tensor) -> Tensor:
        return rows.to(weight.dtype).double()

    try:
        found = improved(rows_GOI, data, ridge=ridge, free=free, stored=stored)
    except AnotherWay:
        return "it is not called in the same way after the cut"
    if found is None:
        return "its inputs or outputs are not finite"
    inputs = old_GOI.shape[-1]
    new = {"weight": like_weight(layer, found.rows_GOJ[..., :inputs]).to(weight)}
    if free:
        assert bias is not None
        new["bias"] = found.rows_GOJ[..., inputs].flatten().to(bias)
    return new, (found.before, found.after)
