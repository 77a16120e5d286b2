"""What a fit is asked to prune, and what of that is due at one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, NoEffect, Unsupported
from lightning_accel.pruning import compensation, selection
from lightning_accel.pruning import history as past
from lightning_accel.pruning import importance as scoring
from lightning_accel.pruning import schedule as scheduling
from lightning_accel.pruning.activations import Statistics, collect_gradients
from lightning_accel.pruning.depth import ONLY, check_depth
from lightning_accel.pruning.foreign import (
    SAID_BY_PRUNER,
    Pruner,
    Turn,
    make_pruner,
    reads_gradients,
    release,
    require_alone,
)
from lightning_accel.pruning.importance import Importance
from lightning_accel.pruning.prune import check_asked, plan
from lightning_accel.pruning.reconstruction import Reconstruction
from lightning_accel.pruning.rounding import check_round_to
from lightning_accel.pruning.sensitivity import graph_of
from lightning_accel.pruning.target import Target, check_share
from lightning_accel.pruning.trains import Step, in_dtype_of
from lightning_accel.surgery import Cut, Select, Structure, twin
from lightning_accel.surgery.call import Call

READ_THE_LOSS = ("taylor", "taylor2")


class Source(Protocol):
    """Training data, for importances that measure."""

    def calls(self) -> Iterable[Sequence[Call]]: ...
    def with_gradients(self) -> nn.Module: ...
    def copy(self) -> nn.Module: ...
    def losses(self, copy: Any) -> Iterable[Tensor]: ...


class Decision(NamedTuple):
    """What to take out, what that leaves of the target's unit, and how that or a refusal is told."""

    cut: Cut
    kept: float | None
    text: str


@dataclass(frozen=True)
class Request:
    """The arguments of `StructuredPruning` that say what to prune; checked.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.
    """

    ratio: float | None
    target: Target | None
    importance: Importance
    scope: str
    steps: int
    schedule: str
    select: Select
    round_to: int | str | None
    attention: str
    compensate: bool | None = None
    depth: bool | str = False
    pruner: Pruner | None = None
    is_search: bool = False
    """Whether only a metric says how much may go."""

    def __post_init__(self) -> None:
        if self.is_search:
            past.require_no_schedule(self.schedule)
            self.asked([])  # each checked
            return
        check_asked(self.ratio, self.target, self.pruner)
        if self.pruner is not None:
            require_alone({name: getattr(self, name) for name in SAID_BY_PRUNER})
        if self.ratio is not None:
            check_share(self.ratio, "ratio")
        compensation.check(self.compensate)
        check_round_to(self.round_to)
        selection.check_attention(self.attention)
        check_depth(self.depth, ratio=self.ratio, pruner=self.pruner, importance=self.importance)
        scoring.check(self.importance)
        selection.check_scope(self.scope)
        scheduling.check(self.schedule, self.steps)

    def settings(self) -> dict[str, Any]:
        """Return what is asked, by the names of the arguments of `StructuredPruning`."""
        left_out = (
            "select",
            "steps",
            "is_search",
        )  # the state's key, `when`, and what follows from them
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in left_out
        }

    def refuse_manual(self, automatic: bool) -> None:
        """Raise `Unsupported` where an importance needs the loss, and a module optimizes by hand."""
        if self.importance in READ_THE_LOSS and not automatic:
            raise Unsupported(
                f"importance={self.importance!r} needs the loss that `training_step` returns",
                "a module with manual optimization",
                "use importance='magnitude'",
            )

    def refuse_other_unit(self, before: str) -> None:
        """Raise when the steps that are done were counted in another unit than the target's.

        Args:
            before: The target of those steps, as it is written.

        Raises:
            AccelError: They were.
        """
        if self.target is None and not self.is_search:
            return
        name = type(self.target or self.asked([])[0].target).__name__
        if before.partition("(")[0] != name and not (self.is_search and before == "None"):
            raise AccelError(
                "a schedule that has begun goes on in the unit in which it began",
                f"target={before} in the checkpoint, {self.target} now",
                f"give the former kind of target, or `{name}` in a new fit from the weights of the checkpoint",
            )

    def plan(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        *,
        due: int,
        left: float,
        dense: Structure,
        source: Source,
        steps: Sequence[Step] = (),
    ) -> Cut:
        """Return the proved cut that brings the model to where it should be after step `due`.

        Args:
            model: The network; it stays as it is.
            calls: Example calls.
            due: Step, from 1.
            left: Share of the target's unit that earlier steps left.
            dense: Sizes before the first step of what has been pruned by now; `ratio` is a share of them.
            source: Training data.
            steps: What else has to run with the smaller network.

        Raises:
            NoEffect: There is nothing to remove, or the target is out of reach.
        """
        ratio, target = self.ratio, None
        if ratio is not None:
            ratio = scheduling.share_gone(ratio, due, self.steps, self.schedule)
        elif self.target is not None:
            share = scheduling.share_left(self.target.share, due, self.steps, self.schedule)
            target = self.target.of(calls).of_rest(share / left)
        batches, why_not = self._calibration(source)
        cut = plan(
            source.with_gradients() if self._reads_gradients(model, calls) else model,
            calls=calls,
            ratio=ratio,
            target=target,
            importance=self.importance,
            scope=self.scope,
            select=self.select,
            round_to=self.round_to,
            attention=self.attention,
            dense=dense,
            batches=batches,
            statistics=self._statistics(calls, dense, source),
            compensate=self.compensate,
            depth=self.depth,
            steps=steps,
            pruner=self.pruner,
            turn=Turn(due, self.steps, dense),
        )
        return dataclasses.replace(cut, notes=(*cut.notes, *why_not))

    def decide(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        *,
        due: int,
        history: Sequence[past.Entry],
        device: torch.device,
        **how: Any,
    ) -> Decision:
        """Return the plan, what it leaves and how to say so; an empty cut if there is none. As `plan`."""
        left = past.left(history)
        due = 1 if self.is_search else due
        for asked in self.asked(history):
            try:
                cut = asked.plan(model, calls, due=due, left=left, **how)
            except NoEffect as error:
                found = Decision(Cut(), None, str(error))
                continue
            kept = asked.kept(model, calls, cut)
            if self.is_search and kept in past.in_vain(history):
                found = Decision(
                    Cut(), None, "The least that could go next was taken back already."
                )
                continue
            return Decision(cut, kept, asked.says(calls, due, left * (kept or 1.0), device))
        return found

    def asked(self, history: Sequence[past.Entry]) -> list[Request]:
        """Return what is asked; of a search what is asked next, and what where that cannot be had."""
        if not self.is_search:
            return [self]
        step = dataclasses.replace(self, steps=1, is_search=False, target=next(past.next_steps([])))
        return [dataclasses.replace(step, target=target) for target in past.next_steps(history)]

    def _calibration(self, source: Source) -> tuple[list[Sequence[Call]], list[str]]:
        """Return the calls of training batches for what measures on them, or why what is no must has none."""
        joint = self.importance == "reconstruction" or isinstance(self.importance, Reconstruction)
        if joint or self.compensate or self.depth or self.importance == "activation":
            return list(source.calls()), []
        if self.compensate is False or self.pruner is not None:
            return [], []
        try:
            return list(source.calls()), []
        except AccelError as error:
            return [], [f"not compensated: {error}"]

    def rehearse(
        self,
        model: nn.Module,
        calls: Sequence[Call],
        *,
        left: float,
        dense: Structure,
        source: Source,
        steps: Sequence[Step] = (),
    ) -> None:
        """Do it all on a copy, but by magnitude and without measuring time; a pruner as it will.

        Raises:
            NoEffect: There is nothing to remove, or the target is out of reach.
        """
        if self.is_search:
            asked = self.asked([])[0]
            asked.rehearse(model, calls, left=left, dense=dense, source=source, steps=steps)
            return
        if self.pruner is not None:
            self.plan(
                model, calls, due=self.steps, left=left, dense=dense, source=source, steps=steps
            )
            return
        ratio, target, depth = self.ratio, self.target, self.depth
        if target is not None:
            target = target.of(calls).of_rest(target.share / left)
            if target.is_measured:
                ratio, target, depth = 1 - target.share, None, depth and ONLY
        plan(
            model,
            calls=calls,
            ratio=ratio,
            target=target,
            scope=self.scope,
            select=self.select,
            round_to=self.round_to if isinstance(self.round_to, int) else None,
            attention=self.attention,
            dense=dense,
            steps=steps,
            depth=depth,
            thorough=False,
        )

    def kept(self, model: nn.Module, calls: Sequence[Call], cut: Cut) -> float | None:
        """Return the share of the target's unit that the cut leaves, counted or measured on copies."""
        if self.target is None:
            return None
        calls = in_dtype_of(calls, model)
        before = twin(model, calls)
        after = twin(before)
        cut.apply(after)
        return self.target.of(calls).compared(before, after, calls)

    def says(self, calls: Sequence[Call], due: int, left: float, device: torch.device) -> str:
        """Write what of the target's unit is left after a step, and what was asked for."""
        if self.target is None:
            return ""
        share = scheduling.share_left(self.target.share, due, self.steps, self.schedule)
        return dataclasses.replace(self.target.of(calls), share=share).says(left, device)

    def _reads_gradients(self, model: nn.Module, calls: Sequence[Call]) -> bool:
        """Whether what ranks reads gradients; a pruner has to be made to know."""
        if self.pruner is None:
            return self.importance == "taylor"
        calls = in_dtype_of(calls, model)
        copy = twin(model, calls)
        made = make_pruner(self.pruner, copy, calls)
        release(made, copy)
        return reads_gradients(made)

    def _statistics(
        self, calls: Sequence[Call], dense: Structure, source: Source
    ) -> Statistics | None:
        if self.importance != "taylor2" or self.depth:
            return None
        copy = source.copy()
        graph = graph_of(copy, calls, select=self.select, attention=self.attention, dense=dense)
        return collect_gradients(copy, graph.groups, source.losses(copy))
