"""What of a request is due at one step of a fit: how much, on what data, and what is told of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.pruning import history as past
from lightning_accel.pruning import schedule as scheduling
from lightning_accel.pruning.activations import Statistics, collect_gradients
from lightning_accel.pruning.foreign import Turn, make_pruner, reads_gradients, release
from lightning_accel.pruning.planning import planned
from lightning_accel.pruning.reconstruction import Reconstruction
from lightning_accel.pruning.request import ONLY, Occasion, Request
from lightning_accel.pruning.sensitivity import graph_of
from lightning_accel.pruning.subject import Subject
from lightning_accel.pruning.trains import Step
from lightning_accel.surgery import Cut, Structure, twin
from lightning_accel.surgery.call import Call


class Source(Protocol):
    """Training data, for importances that measure."""

    def calls(self) -> Iterable[Sequence[Call]]: ...
    def with_gradients(self) -> nn.Module: ...
    def copy(self) -> nn.Module: ...
    def losses(self, copy: Any) -> Iterable[Tensor]: ...


class Fit(NamedTuple):
    """What a plan needs of a fit.

    Attributes:
        source: Training data.
        dense: Sizes before the first step of what has been pruned by now; `ratio` is a share of them.
        left: Share of the target's unit that earlier steps left.
        steps: What else has to run with the smaller network.
    """

    source: Source
    dense: Structure
    left: float = 1.0
    steps: Sequence[Step] = ()


class Decision(NamedTuple):
    """What to take out, what that leaves of the target's unit, and how that or a refusal is told."""

    cut: Cut
    kept: float | None
    text: str


def decide(
    request: Request,
    model: nn.Module,
    calls: Sequence[Call],
    fit: Fit,
    *,
    due: int,
    history: Sequence[past.Entry],
    device: torch.device,
) -> Decision:
    """Return the plan for a step, what it leaves and how to say so; an empty cut if there is none.

    Args:
        request: What is asked.
        model: The network; it stays as it is.
        calls: Example calls.
        fit: What a plan needs of the fit.
        due: Step, from 1.
        history: The prunes of the fit so far.
        device: Where the fit runs, for what is told.
    """
    due = 1 if request.is_search else due
    for asked in request.asked(history):
        try:
            subject, cut = _step(asked, model, calls, fit, due)
        except NoEffect as error:
            found = Decision(Cut(), None, str(error))
            continue
        kept = _kept(asked, subject, cut)
        if request.is_search and kept in past.in_vain(history):
            found = Decision(Cut(), None, "The least that could go next was taken back already.")
            continue
        return Decision(cut, kept, _describe(asked, calls, due, fit.left * (kept or 1.0), device))
    return found


def dry_run(request: Request, model: nn.Module, calls: Sequence[Call], fit: Fit) -> None:
    """Do it all on a copy, but by magnitude and without measuring time; a pruner as it will.

    Raises:
        NoEffect: There is nothing to remove, or the target is out of reach.
    """
    request = request.asked([])[0]
    if request.pruner is not None:
        _step(request, model, calls, fit, due=request.steps)
        return
    ratio, target, depth = request.ratio, request.target, request.depth
    if target is not None:
        target = target.of(calls).of_rest(target.share / fit.left)
        if target.is_measured:
            # Roughly the share of the time: this is about whether anything can go, not how much.
            ratio, target, depth = 1 - target.share, None, depth and ONLY
    plain = dataclasses.replace(
        request,
        ratio=ratio,
        target=target,
        depth=depth,
        importance="magnitude",
        compensate=None,
        round_to=request.round_to if isinstance(request.round_to, int) else None,
    )
    occasion = Occasion(dense=fit.dense, steps=fit.steps, thorough=False)
    planned(Subject.of(model, calls, fit.steps), plain, occasion)


def _step(
    request: Request, model: nn.Module, calls: Sequence[Call], fit: Fit, due: int
) -> tuple[Subject, Cut]:
    """Return the proved cut that brings the model to where it should be after step `due`."""
    now = _share_of(request, calls, due, fit.left)
    batches, why_not = _calibration(request, fit.source)
    statistics = _statistics(request, calls, fit)
    subject = _subject(request, model, calls, fit)
    occasion = Occasion(
        dense=fit.dense,
        batches=batches,
        statistics=statistics,
        steps=fit.steps,
        turn=Turn(due, request.steps, fit.dense),
    )
    cut = planned(subject, now, occasion)
    return subject, dataclasses.replace(cut, notes=(*cut.notes, *why_not))


def _share_of(request: Request, calls: Sequence[Call], due: int, left: float) -> Request:
    """Return what of a request is due: a share of the dense network as `ratio`, of what is left as `target`."""
    if request.ratio is not None:
        ratio = scheduling.share_gone(request.ratio, due, request.steps, request.schedule)
        return dataclasses.replace(request, ratio=ratio)
    if request.target is not None:
        share = scheduling.share_left(request.target.share, due, request.steps, request.schedule)
        target = request.target.of(calls).of_rest(share / left)
        return dataclasses.replace(request, target=target)
    return request


def _subject(request: Request, model: nn.Module, calls: Sequence[Call], fit: Fit) -> Subject:
    """Return what to plan on: with gradients where they rank."""
    if request.pruner is None:
        if request.importance == "taylor":
            model = fit.source.with_gradients()
        return Subject.of(model, calls, fit.steps)
    subject = Subject.of(model, calls, fit.steps)
    copy = twin(subject.network)
    made = make_pruner(request.pruner, copy, subject.whole)  # only an object says what it reads
    release(made, copy)
    if reads_gradients(made):
        return Subject.of(fit.source.with_gradients(), calls, fit.steps)
    return subject


def _calibration(request: Request, source: Source) -> tuple[list[Sequence[Call]], list[str]]:
    """Return the calls of training batches for what measures on them, or why what is no must has none."""
    importance = request.importance
    joint = importance == "reconstruction" or isinstance(importance, Reconstruction)
    if joint or request.compensate or request.depth or importance == "activation":
        return list(source.calls()), []
    if request.compensate is False or request.pruner is not None:
        return [], []
    try:
        return list(source.calls()), []
    except AccelError as error:
        return [], [f"not compensated: {error}"]


def _statistics(request: Request, calls: Sequence[Call], fit: Fit) -> Statistics | None:
    if request.importance != "taylor2" or request.depth:
        return None
    copy = fit.source.copy()
    how: Any = {"select": request.select, "attention": request.attention, "dense": fit.dense}
    return collect_gradients(copy, graph_of(copy, calls, **how).groups, fit.source.losses(copy))


def _kept(request: Request, subject: Subject, cut: Cut) -> float | None:
    """Return the share of the target's unit that the cut leaves, counted or measured on copies."""
    if request.target is None:
        return None
    before, after = twin(subject.network), twin(subject.network)
    cut.apply(after)
    return request.target.of(subject.calls).compared(before, after, subject.whole)


def _describe(
    request: Request, calls: Sequence[Call], due: int, left: float, device: torch.device
) -> str:
    """Write what of the target's unit is left after a step, and what was asked for."""
    if request.target is None:
        return ""
    share = scheduling.share_left(request.target.share, due, request.steps, request.schedule)
    return dataclasses.replace(request.target.of(calls), share=share).describe(left, device)
