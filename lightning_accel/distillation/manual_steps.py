"""A step of manual optimization: its losses go to `manual_backward`, and what was done to them is done to the lessons."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_accel.distillation import dry_run
from lightning_accel.distillation.fit_state import FitState
from lightning_accel.distillation.scale import Scale, outermost
from lightning_accel.distillation.schedule import now
from lightning_accel.distillation.steps import depends_on
from lightning_accel.errors import NoEffect, explain

_LITTLE = 1e-3


class ManualSteps:
    """Stands around `training_step` and `manual_backward` of a course.

    Args:
        fit_state: The fit's.
    """

    def __init__(self, fit_state: FitState) -> None:
        self.fit_state = fit_state
        self._batch: Any = None
        self._taught: list[Any] = []
        """Outputs of the student in this step that a loss has been added for."""
        self._scale = Scale()
        self._warned = False

    def step(self, method: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand around `training_step`.

        Raises:
            NoEffect: The step calls `backward` of a loss of the student's itself.
        """
        fit_state = self.fit_state
        self._batch = dry_run.view(batch)
        try:
            with fit_state.recording():
                result = method(*args, **kwargs)
            outputs = [record.output for record in fit_state.records()]
            fit_state.could_teach = fit_state.could_teach or bool(outputs)
            passed = any(depends_on(loss, out) for loss in fit_state.passed for out in outputs)
            if passed and not self._taught:
                raise NoEffect(
                    "the training step calls `loss.backward()` itself, so that nothing could be added to the loss",
                    f"a loss that hangs on what the student `{fit_state.name}` gave",
                    "call `self.manual_backward(loss)`, which precision and strategy need as well",
                )
        finally:
            self._batch, self._taught = None, []
        return result

    def backward(self, method: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stand around `manual_backward`: add to the loss that hangs on the student's output."""
        fit_state, taught = self.fit_state, self._taught
        fit_state.could_teach = True
        fresh = [r for r in fit_state.records() if all(r.output is not t for t in taught)]
        records = [r for r in fresh if depends_on(loss, r.output)]
        if records:
            outputs = [record.output for record in records]
            taught += outputs
            loss = fit_state.compute_loss(
                loss, records, self._batch, partial(self._scale_of, loss, outputs)
            )
        elif any(depends_on(loss, output) for output in taught):
            self._look_at_rest(loss)
            loss = loss * now(fit_state.engine.task_weight, fit_state.moment())
        return method(loss, *args, **kwargs)

    def _scale_of(self, loss: Tensor, outputs: Sequence[Any], first: bool) -> Tensor | float:
        """Return how often the user's criterion counts in a loss."""
        if first:
            self._scale = self._learn(loss, outputs)
        found = self._scale(loss, outputs)
        if found is not None:
            if first and abs(float(found) - 1) > _LITTLE:
                rank_zero_info(
                    f"`manual_backward` was given {float(found):.4g} times the criterion of the training step, and "
                    "the losses of distillation are taken as often, in each step as it is there."
                )
            return found
        if loss._backward_hooks:
            self._warn("a loss with hooks of your own, which another look would call")
        elif self._scale.is_known:
            self._warn("a loss that is built otherwise than in the first step")
        elif first or self.fit_state.log_is_due():
            last = outermost(loss)
            if abs(last - 1) > _LITTLE:
                self._warn(f"{last:.4g} times a loss in which no criterion of torch tells it")
        return 1.0

    def _look_at_rest(self, loss: Tensor) -> None:
        """Warn where the criterion comes with a later loss of the first step, and scaled."""
        if self.fit_state.heard and not self._scale.is_known:
            found = self._learn(loss, self._taught)(loss, self._taught)
            if found is not None and abs(float(found) - 1) > _LITTLE:
                self._warn("another loss first, and then the criterion, scaled")

    def _learn(self, loss: Tensor, outputs: Sequence[Any]) -> Scale:
        terms = self.fit_state.engine.terms.values()
        beside = frozenset(term.compares for term in terms if term.compares)
        return Scale.learn(loss, outputs, self.fit_state.heard, beside)

    def _warn(self, given: str) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                explain(
                    "how often the criterion counts is not clear, and the losses of distillation are taken once",
                    f"`manual_backward` was given {given}",
                    "give it one loss, made with a criterion of torch or the `.loss` of the student's output; or "
                    "weights of distillation that hold the factor",
                )
            )
