"""The consumers' weights after a cut, solved anew so that they make what they made before.

A layer that reads pruned channels loses their part of its pre-activation. What is left is often
correlated with what is gone, so its weights (and its bias, where it has one) can make up for much of
it: least squares on calibration data, without labels (as in ThiNet, Luo et al. 2017, arXiv:1707.06342,
and channel pruning, He et al. 2017, arXiv:1707.06168):

    min_D  sum over samples || y - (W + D) x ||^2 + ridge || D ||^2.

y is the layer's output in the *dense* network, x its input in the *pruned* one, and layers are solved in
the order in which they run, each behind those already solved. So a layer also makes up for what earlier
layers could not, instead of adding to it. D is a change of the old weights: where the data say nothing
(few samples, equal channels) the ridge keeps the old values, not zero. Only X^T X and X^T R are kept of
the data; everything is in float64. An output whose error on the data would not go down keeps its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.errors import explain
from lightning_accel.pruning.reconstruction import evaluating
from lightning_accel.pruning.unfold import (
    by_block,
    exact,
    like_weight,
    matrix,
    only_input,
    output_dim,
    patches,
    pieces,
    samples,
    why_unreadable,
)
from lightning_accel.surgery import Change, twin
from lightning_accel.surgery.call import Call, run

if TYPE_CHECKING:
    from lightning_accel.pruning.graph import Group

Gone = Mapping[str, Sequence[int]]
_ANOTHER_WAY = "it is not called in the same way after the cut"
_WIDE = 8192  # inputs x kernel from which a layer is not solved: X^T X would take over half a GB


class Compensation(NamedTuple):
    """New values for a pruned model, and what they are worth on the calibration data.

    Attributes:
        values: Parameter name -> tensor of the pruned model's shape and dtype, to be copied into it.
        errors: Layer name -> squared error of its pre-activation before and after, summed over data.
        left_out: Layers that read pruned channels but were not solved, and why.
    """

    values: dict[str, Tensor]
    errors: dict[str, tuple[float, float]]
    left_out: tuple[Change, ...]


@torch.no_grad()
def compensate(
    dense: nn.Module,
    cut: nn.Module,
    *,
    groups: Sequence[Group],
    gone: Gone,
    batches: Iterable[Sequence[Call]],
    ridge: float = 3e-3,
) -> Compensation:
    """Solve the weights of all layers that read pruned units; neither model is changed.

    Args:
        dense: A twin of the network before the cut.
        cut: The network after the cut, or a twin of it.
        groups: Groups of `dense`.
        gone: Group name -> removed units; that is how `cut` differs from `dense`.
        batches: The calls of each batch. They are run once per layer.
        ridge: Pull to the old weights, relative to the mean squared input; above 0.

    Raises:
        ValueError: `ridge` is not positive, or there is no batch.

    >>> from lightning_accel.pruning.graph import Group, Member
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
    if not ridge > 0:
        raise ValueError(explain("`ridge` is above 0", repr(ridge), "pass 3e-3, say"))
    steps = [list(calls) for calls in batches]
    if not steps:
        raise ValueError(explain("there is nothing to solve from", "no batch"))
    work = twin(cut)
    readers, left_out = _readers(work, groups, gone)
    values: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, float]] = {}
    with evaluating(dense), evaluating(work):
        for name in _in_order(dense, readers, steps[0]):
            kept = _kept_outputs(dense, name, groups, gone)
            found = _solve_layer(dense, work, name, kept, steps, ridge)
            if isinstance(found, str):
                left_out.append(Change(name, found))
                continue
            new, errors[name] = found
            for leaf, value in new.items():
                parameter = work.get_submodule(name)._parameters[leaf]
                assert parameter is not None
                parameter.copy_(value)
                values[f"{name}.{leaf}".lstrip(".")] = parameter.detach().clone()
    missed = set(readers) - set(errors) - {change.name for change in left_out}
    left_out += [Change(name, "its forward is not called") for name in sorted(missed)]
    return Compensation(values, errors, tuple(left_out))


def solve(gram: Tensor, cross: Tensor, *, ridge: float = 0.0, free: int = 0) -> Tensor:
    """Return the D that minimises ||R - X D||^2 + pull ||D||^2 from X^T X and X^T R.

    Args:
        gram: X^T X, shape (..., inputs, inputs), float64.
        cross: X^T R, shape (..., inputs, outputs).
        ridge: The pull, relative to the mean of the diagonal of `gram`.
        free: The last `free` inputs (a bias) are not pulled.

    Where the inputs are linearly dependent and nothing pulls, it is the solution of least norm.

    >>> x = torch.randn(20, 3, dtype=torch.float64)
    >>> y = torch.randn(20, 2, dtype=torch.float64)
    >>> torch.allclose(solve(x.T @ x, x.T @ y), torch.linalg.lstsq(x, y).solution)
    True
    """
    inputs = gram.shape[-1]
    pulled = torch.arange(inputs, device=gram.device) < inputs - free
    mean = gram.diagonal(dim1=-2, dim2=-1)[..., pulled].mean(-1, keepdim=True)
    system = gram + torch.diag_embed(ridge * mean * pulled)
    factor, failed = torch.linalg.cholesky_ex(system)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    smallest = 1e-7 * system.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    if not failed.any() and (pivots > smallest).all():
        return torch.cholesky_solve(cross, factor)
    return torch.linalg.pinv(system, hermitian=True, rtol=inputs * 1e-14) @ cross


def _readers(
    cut: nn.Module, groups: Sequence[Group], gone: Gone
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


def _in_order(dense: nn.Module, names: Iterable[str], calls: Sequence[Call]) -> list[str]:
    """Return the names of the layers that are called, in the order of their first calls."""
    by_module = {dense.get_submodule(name): name for name in names}
    order: dict[str, None] = {}

    def note(module: nn.Module, *_: Any) -> None:
        order.setdefault(by_module[module])

    with _after(by_module, note):
        run(dense, calls)
    return list(order)


def _kept_outputs(
    dense: nn.Module, name: str, groups: Sequence[Group], gone: Gone
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
    dense: nn.Module,
    cut: nn.Module,
    name: str,
    kept: Tensor | None,
    batches: Sequence[Sequence[Call]],
    ridge: float,
) -> tuple[dict[str, Tensor], tuple[float, float]] | str:
    """Return new values and the error before and after, or why there are none."""
    layer = cut.get_submodule(name)
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    old = matrix(layer, weight)  # (groups, outputs, inputs x kernel)
    offset = old.new_zeros(old.shape[:2]) if bias is None else exact(bias).view(old.shape[:2])
    free = int(bias is not None and bias.requires_grad)
    inputs = old.shape[-1]
    if inputs > _WIDE:
        return f"its {inputs} inputs are more than the {_WIDE} that are solved together"
    gram = old.new_zeros(len(old), inputs + free, inputs + free)
    cross = old.new_zeros(len(old), inputs + free, old.shape[1])
    before = 0.0
    for wanted, given in _pairs(dense, cut, name, batches):
        if wanted is None or given is None:
            return _ANOTHER_WAY
        given, wanted = samples(layer, given), samples(layer, wanted)
        if len(given) != len(wanted):
            return _ANOTHER_WAY
        for x, y in _unfolded(layer, given, wanted, kept):
            missing = y - x @ old.mT - offset[:, None]
            x = F.pad(x, (0, free), value=1.0)
            gram += x.mT @ x
            cross += x.mT @ missing
            before += float(missing.square().sum())
    if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
        return "its inputs or outputs are not finite"
    change = solve(gram, cross, ridge=ridge, free=free).mT  # (groups, outputs, inputs x kernel + 1)
    rows = torch.cat([old, offset[..., None]], -1)[..., : inputs + free]
    goal = (rows + change).to(weight.dtype).double()  # judged as it will be stored
    change = goal - rows
    gain = ((2 * cross.mT - change @ gram) * change).sum(-1)  # of the squared error, per output
    better = gain > 0
    goal = torch.where(better[..., None], goal, rows)
    new = {"weight": like_weight(layer, goal[..., :inputs]).to(weight)}
    if free:
        assert bias is not None
        new["bias"] = goal[..., inputs].flatten().to(bias)
    return new, (before, max(0.0, before - float(gain[better].sum())))


_Pair = tuple[Tensor | None, Tensor | None]


def _pairs(
    dense: nn.Module, cut: nn.Module, name: str, batches: Sequence[Sequence[Call]]
) -> Iterator[_Pair]:
    """Yield the layer's output in the dense and its input in the pruned network, call by call."""
    wanted: list[Tensor | None] = []
    given: list[Tensor | None] = []

    def note_output(_: nn.Module, __: Any, ___: Any, output: Any) -> None:
        wanted.append(output if isinstance(output, Tensor) else None)

    def note_input(_: nn.Module, args: Any, kwargs: Any, __: Any) -> None:
        given.append(only_input(args, kwargs))

    for calls in batches:
        wanted.clear()
        given.clear()
        with _after([dense.get_submodule(name)], note_output):
            run(dense, calls)
        with _after([cut.get_submodule(name)], note_input):
            run(cut, calls)
        if len(wanted) != len(given):
            yield None, None
        yield from zip(wanted, given, strict=False)


def _unfolded(
    layer: nn.Module, x: Tensor, y: Tensor, kept: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield X and Y, some samples at a time."""
    if kept is not None:
        y = y[:, kept.to(y.device)]
    step = pieces(layer, x)
    for part, target in zip(x.split(step), y.split(step), strict=True):
        yield patches(layer, part), by_block(layer, target)


@contextmanager
def _after(modules: Iterable[nn.Module], note: Callable[..., None]) -> Iterator[None]:
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
