"""A split network computes what the whole one does: losses, gradients and all that a step leaves, before it trains.

The trace knows which widths go together, and not whether something between two layers adds up over them: a norm
written by hand, `x + x.sum(-1)`. So a step of the user's runs on a whole copy and on a split one, with weights shaken so
that no gate is closed, and everything is compared in all processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.errors import NoEffect
from lightning_accel.parallel.tensor.plan import TensorPlan
from lightning_accel.parallel.tensor.split import SplitModel
from lightning_accel.pruning.variants import vary
from lightning_accel.surgery.call import numbers
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.surgery.rng import seed_rng
from lightning_accel.surgery.structure import named_tensors

Step = Callable[[Any], Any]
"""Runs once on a copy, and returns numbers to compare; gradients are on the copy then."""
Copy = Callable[[bool], AbstractContextManager[nn.Module]]
"""Gives a whole copy, in full precision or as it is."""

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
_OF_SHORT_FORMATS = 6e-2


class Proved(NamedTuple):
    """A plan that computes what the whole network does.

    Attributes:
        plan: What is split.
        partial: Weights that all processes have, of whose gradients each finds a part, to be added.
        draws: Regions in which random numbers are drawn.
        inside: Modules that run between the layers that make split units and those that read them.
    """

    plan: TensorPlan
    partial: tuple[str, ...]
    draws: frozenset[int]
    inside: frozenset[str]


class _Outcome(NamedTuple):
    """What a step returned, the gradients, and the tensors that it changed."""

    results: list[Tensor]
    gradients: dict[str, Tensor | None]
    left: dict[str, Tensor]


def proved_plan(
    plan: Callable[[Mapping[str, str]], TensorPlan],
    copy: Copy,
    steps: list[Step],
    group: Any,
    *,
    later: Sequence[Step] = (),
) -> Proved:
    """Return a plan that is proved, without the groups that are not what the whole network is.

    All processes of the group call it, with the same batches.

    Args:
        plan: Makes a plan without the groups with some signatures; the same on all processes.
        copy: Gives a whole copy of the module on the device, for as long as it is entered.
        steps: What is compared.
        later: The same, once it is known of which gradients each process finds a part.
        group: The processes among which the network is split.

    Raises:
        NoEffect: No group can be split.
    """
    proof = _Proof(copy, steps, later, group)
    without: dict[str, str] = {}
    while True:
        found = plan(without)
        wrong = proof.wrong(found)
        if not wrong:
            return Proved(found, *proof.seen)
        signatures = list(dict.fromkeys(g.signature for g in found.groups))
        guilty: dict[str, str] = {}
        for one in signatures if len(signatures) > 1 else ():
            others = {s: "it is tried alone" for s in signatures if s != one}
            try:
                alone = proof.wrong(plan({**without, **others}))
            except NoEffect:  # not without what it must stay as wide as
                continue
            if alone:
                guilty[one] = alone
        without.update(guilty or {signatures[-1]: wrong})


class _Proof:
    def __init__(self, copy: Copy, steps: list[Step], later: Sequence[Step], group: Any) -> None:
        self._copy, self._steps, self._later, self._group = copy, steps, later, group
        self._whole = self._first_that_runs()
        self._whole_later = [self._run(step, None)[0] for step in later]
        self.seen: Any = ((), frozenset(), frozenset())

    def _first_that_runs(self) -> list[_Outcome]:
        """Run the steps on whole copies: in full precision, and with gradients of frozen weights, which may learn later.

        A step that writes into frozen weights, or names a format itself, runs as it is.
        """
        for self._full, self._thaws in ((True, True), (True, False), (False, False)):
            try:
                return [self._run(step, None)[0] for step in self._steps]
            except Exception:
                if not self._full:
                    raise
        raise AssertionError

    def wrong(self, plan: TensorPlan) -> str:
        """Return what differs between the whole and the split network, the same on all processes; nothing if none does."""
        partial, draws, inside = set[str](), set[int](), set[str]()
        for step, whole in zip(self._steps, self._whole, strict=True):
            why, found, model = self._compared(step, whole, plan)
            if why:
                return why
            partial |= found.partial
            draws |= model.draws.regions
            inside |= model.inside
        every = [
            frozenset().union(*found)
            for found in zip(*self._of_all((partial, draws, inside)), strict=True)
        ]
        summed = tuple(sorted(every[0]))
        for step, whole in zip(self._later, self._whole_later, strict=True):
            why, found, _ = self._compared(step, whole, plan, summed)
            if why := why or self._agreed("gradients are parts" if found.partial else ""):
                return f"in a hook of the module, {why}"
        self.seen = summed, *every[1:]
        return ""

    def _compared(
        self, step: Step, whole: _Outcome, plan: TensorPlan, summed: Sequence[str] = ()
    ) -> Any:
        """Return what differs in one step, the comparison, and the split model."""
        split, model, failed = None, None, ""
        try:
            split, model = self._run(step, plan, summed)
        except Exception as error:  # whatever a forward raises whose widths are not what it expects
            failed = f"the step fails when it is split: {type(error).__name__}: {error}"
        if why := self._agreed(failed):
            return why, None, None
        assert split is not None and model is not None
        found = _Comparison(whole, split, model, self._group, short=not self._full)
        return self._agreed(found.wrong), found, model

    def _of_network(self, value: Any) -> list[Any]:
        every: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(every, value, group=self._group)
        return every

    def _agreed(self, wrong: str) -> str:
        return next(filter(None, self._of_all(wrong)), "")

    def _of_all(self, value: Any) -> list[Any]:
        """Return what each process has found, those of other networks' copies included."""
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, value)
        return every

    def _run(self, step: Step, plan: TensorPlan | None, summed: Sequence[str] = ()) -> Any:
        with preserve_rng(), self._copy(self._full) as copy:
            seed_rng(0)
            _shake(copy)
            if self._thaws:
                for parameter in copy.parameters():
                    if parameter.is_floating_point():
                        parameter.requires_grad_(True)
            split, before = None, _sums(copy)
            if plan is not None:
                split = SplitModel(copy, plan, self._group)
                split.watch()
                before = _sums(copy)
                vars(copy).update(
                    _is_split=True, _sum_partial=functools.partial(self._sum, copy, summed)
                )
            with _no_dropout():
                results = [r.detach() for r in numbers(step(copy))]
            gradients = {n: p.grad for n, p in copy.named_parameters()}
            changed = {n for n, sums in _sums(copy).items() if sums != before[n]}
            if split is not None:  # a part may rest where another changes
                changed = set().union(*self._of_network(changed))
            left = {n: t.detach().clone() for n, t in named_tensors(copy) if n in changed}
            for parameter in copy.parameters():
                parameter.grad = None
            if split is not None:
                if copy.training:  # once more, with the random numbers that a step draws
                    step(copy)
                split.leave()
            return _Outcome(results, gradients, left), split

    def _sum(self, copy: nn.Module, names: Sequence[str]) -> None:
        """Add the parts of gradients that each process found."""
        for name in names:
            gradient = copy.get_parameter(name).grad
            if gradient is not None:
                dist.all_reduce(gradient, group=self._group)


class _Comparison:
    """Compares what a step did with a whole network and with a split one."""

    def __init__(
        self, whole: _Outcome, split: _Outcome, model: SplitModel, group: Any, *, short: bool
    ) -> None:
        self._model, self._group, self._short = model, group, short
        self._device = next(model.model.parameters()).device
        self.partial: set[str] = set()
        self.wrong = (
            self._results(whole, split) or self._left(whole, split) or self._gradients(whole, split)
        )

    def _results(self, whole: _Outcome, split: _Outcome) -> str:
        if len(whole.results) != len(split.results):
            return "the step returns other things"
        for one, other in zip(whole.results, split.results, strict=True):
            if error := self._everywhere(self._differ(one, other)):
                return f"the loss or output differs by {error:.1e} of its size"
        return ""

    def _left(self, whole: _Outcome, split: _Outcome) -> str:
        if different := sorted(whole.left.keys() ^ split.left.keys()):
            return f"`{different[0]}` is changed by the step of one and not of the other"
        for name in whole.left:
            there = self._model.whole(name, split.left[name])
            if error := self._everywhere(self._differ(whole.left[name], there)):
                return f"`{name}` is changed by the step, and differs by {error:.1e} of its size"
        return ""

    def _gradients(self, whole: _Outcome, split: _Outcome) -> str:
        floor = max(
            (float(g.abs().max()) for g in whole.gradients.values() if g is not None and g.numel()),
            default=0.0,
        )
        for name, one in whole.gradients.items():
            other = split.gradients[name]
            lacks = self._everywhere(float(other is None))
            if one is None or lacks:
                if one is not None or self._everywhere(float(other is not None)):
                    return f"`{name}` has a gradient on some processes only"
                continue
            assert other is not None
            if name in self._model.kept:
                if error := self._everywhere(
                    self._differ(one, self._model.whole(name, other), floor)
                ):
                    return f"the gradient of `{name}` differs by {error:.1e} of its size"
            elif why := self._replicated(name, one, other, floor):
                return why
        return ""

    def _replicated(self, name: str, one: Tensor, other: Tensor, floor: float) -> str:
        """Compare the gradient of a weight that every process has: the whole, or parts that add up to it."""
        error = self._everywhere(self._differ(one, other, floor))
        total = other.clone()
        dist.all_reduce(total, group=self._group)
        if not error and (one.any() or name.rpartition(".")[0] not in self._model.inside):
            return ""
        if self._everywhere(self._differ(one, total, floor)):
            return f"the gradient of `{name}` differs by {error:.1e} of its size"
        self.partial.add(name)
        return ""

    def _everywhere(self, error: float) -> float:
        largest = torch.tensor(error, device=self._device)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._group)
        return float(largest)

    def _differ(self, one: Tensor, other: Tensor, floor: float = 0.0) -> float:
        """Return the largest difference by the size of the tensor, or zero where it is rounding."""
        if one.shape != other.shape:
            return float("inf")
        if not one.is_floating_point() and not one.is_complex():
            return 0.0 if torch.equal(one, other) else 1.0
        limit = (
            _OF_SHORT_FORMATS if self._short else _TOLERANCE.get(one.real.dtype, _OF_SHORT_FORMATS)
        )
        one, other = (
            torch.nan_to_num(t.to(torch.complex128 if t.is_complex() else torch.float64))
            for t in (one, other)
        )
        size = float(one.abs().max()) if one.numel() else 0.0
        error = float((one - other).abs().max()) if one.numel() else 0.0
        return error / max(size, 1e-30) if error > limit * (size + 1e-3 * floor) else 0.0


@torch.no_grad()
def _sums(copy: nn.Module) -> dict[str, tuple[float, ...]]:
    """Return two sums of each tensor, which tell whether it has changed."""
    found: dict[str, tuple[float, ...]] = {}
    for name, tensor in named_tensors(copy):
        flat = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        found[name] = float(flat.double().sum()), float(flat.double().square().sum())
    return found


@torch.no_grad()
def _shake(copy: nn.Module) -> None:
    """Open the gates of a copy, the same on all processes: zeros before a layer hide what is wrong behind it."""
    vary(copy)
    generator = torch.Generator().manual_seed(1)
    for parameter in copy.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.1 * noise.to(parameter))


@contextmanager
def _no_dropout() -> Iterator[None]:
    """Let dropout do nothing, in recomputations on other threads too: a split network has masks of its own."""

    def passed(given: Tensor, *_: Any, **__: Any) -> Tensor:
        return given

    def attend(*args: Any, **given: Any) -> Tensor:
        args = (
            (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        )  # the fifth is its probability
        return attention(*args, **(given | {"dropout_p": 0.0} if "dropout_p" in given else given))

    attention = F.scaled_dot_product_attention
    held = [(home, name, getattr(home, name)) for home, names in _DROPOUTS for name in names]
    try:
        for home, name, _ in held:
            setattr(home, name, passed)
        F.scaled_dot_product_attention = attend
        yield
    finally:
        F.scaled_dot_product_attention = attention
        for home, name, function in held:
            setattr(home, name, function)


_DROPOUTS = (
    (
        F,
        (
            "dropout",
            "dropout1d",
            "dropout2d",
            "dropout3d",
            "alpha_dropout",
            "feature_alpha_dropout",
        ),
    ),
    (torch, ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")),
)
