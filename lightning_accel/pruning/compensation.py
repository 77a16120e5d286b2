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
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.errors import AccelError, explain
from lightning_accel.pruning.least_squares import Piece, improved
from lightning_accel.pruning.leftover import Leftover
from lightning_accel.pruning.lockstep import Lockstep, OutOfStep
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
from lightning_accel.surgery.preserve import preserve_rng

if TYPE_CHECKING:
    from lightning_accel.pruning.graph import Group

Gone = Mapping[str, Sequence[int]]
_COMPUTES_MORE = "it gives out something else than its input times its weight, and its bias"
_ENOUGH, _AT_LEAST = 32, 4096
"""Samples for each input of a layer, and of a layer: of more, as many are drawn."""


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
    gone: Gone,
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
    if ridge is not None and not ridge > 0:
        raise ValueError(explain("`ridge` is above 0", repr(ridge), "pass 3e-3, say"))
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
        tried = [calls for i, calls in enumerate(steps) if _held_out(1, i, len(steps))[1]] or steps
        leftover = Leftover(dense, tried, renews=False)
        before = leftover.of(work)
        order, others = _counted(dense, readers, steps[0])
        left_out += [Change(name, _COMPUTES_MORE) for name in sorted(others)]
        once = [name for name, count in order.items() if count == 1]
        with _Seen(dense, work, steps, once) as seen:
            for name in order:
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


def check(compensate: Any) -> None:
    """Raise unless this says whether to compensate."""
    if compensate is not None and type(compensate) is not bool:
        raise TypeError(
            explain("`compensate` is true or false", repr(compensate), "pass True or False")
        )


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

    with _after(by_module, note), preserve_rng():
        run(dense, calls)
    return {name: count for name, count in order.items() if name not in others}, others


def _is_product(layer: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether a layer gives out its input times its matrix, and its bias, as far as the first sample shows."""
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    given, wanted = samples(layer, x)[:1], samples(layer, y)[:1]
    rows = matrix(layer, weight)
    found = patches(layer, given) @ rows.mT
    if bias is not None:
        found = found + exact(bias).view(rows.shape[:2])[:, None]
    wanted = by_block(layer, wanted)
    if found.shape != wanted.shape:
        return False
    scale = wanted.abs().amax() if wanted.numel() else 0.0
    return bool(((found - wanted).abs() <= 0.02 * scale).all() or not wanted.isfinite().all())


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
    old = matrix(layer, weight)  # (groups, outputs, inputs x kernel)
    offset = old.new_zeros(old.shape[:2]) if bias is None else exact(bias).view(old.shape[:2])
    rows = torch.cat([old, offset[..., None]], -1) if free else old

    def data() -> Iterator[Piece]:
        for x, y, held_out in _unfolded(layer, pairs(), kept, count):
            if free:
                yield Piece(F.pad(x, (0, 1), value=1.0), y, held_out)
            else:
                yield Piece(x, y - offset[:, None], held_out)

    def stored(rows: Tensor) -> Tensor:
        return rows.to(weight.dtype).double()

    try:
        found = improved(rows, data, ridge=ridge, free=free, stored=stored)
    except _AnotherWay:
        return "it is not called in the same way after the cut"
    if found is None:
        return "its inputs or outputs are not finite"
    inputs = old.shape[-1]
    new = {"weight": like_weight(layer, found.rows[..., :inputs]).to(weight)}
    if free:
        assert bias is not None
        new["bias"] = found.rows[..., inputs].flatten().to(bias)
    return new, (found.before, found.after)


class _AnotherWay(Exception):
    """A layer is called in another way after the cut."""


Pairs = list[tuple[Tensor, Tensor]]
"""A layer's output in the dense network and its input in the pruned one, for the calls of one batch."""


class _Seen:
    """What layers see on the batches: in one forward of all as long as they come to the layers in step."""

    def __init__(
        self,
        dense: nn.Module,
        cut: nn.Module,
        batches: Sequence[Sequence[Call]],
        once: Sequence[str],
    ) -> None:
        self._dense, self._cut, self._batches, self._once = dense, cut, batches, once
        self._runs = [
            Lockstep(dense, batches, once, after=True),
            Lockstep(cut, batches, once, after=False),
        ]

    def __enter__(self) -> _Seen:
        return self

    def __exit__(self, *_: object) -> None:
        while self._runs:
            self._runs.pop().__exit__()

    def pairs(self, name: str) -> Callable[[], Iterable[Pairs]]:
        """Return what gives them, for each batch."""
        if self._runs and name in self._once:
            try:
                wanted, given = (runs.at(name) for runs in self._runs)
            except OutOfStep:
                self.__exit__()
            else:
                seen = [([y], [only_input(*x)]) for y, x in zip(wanted, given, strict=True)]
                return lambda: [_paired(*both) for both in seen]
        return partial(self._anew, name)

    def _anew(self, name: str) -> Iterator[Pairs]:
        wanted: list[Any] = []
        given: list[Any] = []
        notes = (
            (self._dense, lambda _, __, ___, output: wanted.append(output)),
            (self._cut, lambda _, args, kwargs, __: given.append(only_input(args, kwargs))),
        )
        for calls in self._batches:
            wanted.clear()
            given.clear()
            for network, note in notes:
                with _after([network.get_submodule(name)], note), preserve_rng():
                    run(network, calls)
            yield _paired(wanted, given)


def _paired(wanted: Sequence[Any], given: Sequence[Any]) -> Pairs:
    are_tensors = all(isinstance(value, Tensor) for value in (*wanted, *given))
    if len(wanted) != len(given) or not are_tensors:
        raise _AnotherWay
    return list(zip(wanted, given, strict=True))


def _unfolded(
    layer: nn.Module, batches: Iterable[Pairs], kept: Tensor | None, count: int
) -> Iterator[Piece]:
    """Yield X and Y, some samples at a time; where there are many, at random places."""
    chance = torch.Generator().manual_seed(0)
    share = 0.0
    for index, pairs in enumerate(batches):
        for y, x in pairs:
            given, wanted = samples(layer, x), samples(layer, y)
            if len(given) != len(wanted):
                raise _AnotherWay
            if kept is not None:
                wanted = wanted[:, kept.to(wanted.device)]
            step = pieces(layer, given)
            seen, tried = _held_out(len(given), index, count)
            for held_out, some in ((False, seen), (True, tried)):
                for start in range(some.start, some.stop, step):
                    piece = slice(start, min(start + step, some.stop))
                    rows, target = patches(layer, given[piece]), by_block(layer, wanted[piece])
                    if not share:
                        positions = rows.shape[1] / (piece.stop - piece.start) * len(given)
                        enough = max(_AT_LEAST, _ENOUGH * rows.shape[2])
                        share = enough / (positions * len(pairs) * count)
                    if share < 1:
                        places = torch.randperm(rows.shape[1], generator=chance)
                        places = places[: math.ceil(share * len(places))].to(rows.device)
                        rows, target = rows[:, places], target[:, places]
                    yield Piece(rows, target, held_out)


def _held_out(samples: int, index: int, count: int) -> tuple[range, range]:
    """Return which samples of a batch are solved on, and which tried on: whole batches where there are several."""
    if count > 1:
        edge = 0 if index % 5 == min(count, 5) - 1 else samples
    else:
        edge = samples - samples // 4
    return range(edge), range(edge, samples)


@contextmanager
def _after(modules: Iterable[nn.Module], note: Callable[..., None]) -> Iterator[None]:
    handles = [m.register_forward_hook(note, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
