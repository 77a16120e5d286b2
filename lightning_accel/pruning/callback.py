"""When to prune: before an epoch of a fit, once or along a schedule."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_accel.bridge import guards
from lightning_accel.bridge.example import (
    batches,
    calls_of,
    find_example,
    inert_copy,
    run_step,
)
from lightning_accel.bridge.model_edit import ModelEdit, commit
from lightning_accel.bridge.restore import averages, pristine
from lightning_accel.errors import AccelError, NoEffect, Unsupported, explain
from lightning_accel.pruning import importance as scoring
from lightning_accel.pruning.prune import check_ratio, check_round_to, plan
from lightning_accel.pruning.recalibrate import recalibrate
from lightning_accel.pruning.schedule import epochs, share_left
from lightning_accel.surgery import Cut, Receipt, Select, Stage, twin
from lightning_accel.surgery.call import Call

_TAYLOR_BATCHES = 10


class StructuredPruning(ModelEdit):
    """Make the network smaller during a fit, and keep everything that hangs on it working.

    Optimizer state, weight averages, DDP, checkpoints and resume follow; batch-norm statistics are
    re-estimated from unlabelled training batches. What could not be pruned is listed with its reason.

    Args:
        ratio: Share of the channels of every layer to remove, above 0 and below 1.
        target_macs: Instead of `ratio`, the share of the multiply-accumulates to keep.
        importance: "magnitude", "taylor" (gradients of ten training batches) or "random".
        when: Epoch before which to prune, counted from 0; or a list of epochs over which the share
            rises linearly to the one asked for.
        select: Layers whose channels may go: a `Select`, a name pattern or several. The last layer is
            never pruned.
        round_to: Kept channels are raised to a multiple of this.
        recalibrate: Training batches for new batch-norm statistics after each prune; 0 keeps the old.
        example: Arguments of the LightningModule's `forward`; by default `example_input_array`, else
            what its networks receive in `training_step`.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.

    >>> StructuredPruning(ratio=0.5, when=[2, 4]).when
    (2, 4)
    """

    stage: ClassVar[Stage] = Stage.SHAPE

    def __init__(
        self,
        ratio: float | None = None,
        *,
        target_macs: float | None = None,
        importance: str = "magnitude",
        when: int | Iterable[int] = 0,
        select: Select | str | Sequence[str] | dict[str, Any] | None = None,
        round_to: int | None = None,
        recalibrate: int = 10,
        example: Any = None,
    ) -> None:
        if (ratio is None) == (target_macs is None):
            raise ValueError(
                explain(
                    "pruning takes either `ratio` or `target_macs`",
                    f"ratio={ratio!r}, target_macs={target_macs!r}",
                    "pass one of the two",
                )
            )
        if ratio is not None:
            check_ratio(ratio)
        if target_macs is not None:
            check_ratio(target_macs, "target_macs")
        check_round_to(round_to)
        if type(recalibrate) is not int or recalibrate < 0:
            raise ValueError(
                explain("`recalibrate` is a number of batches", repr(recalibrate), "pass 10, say")
            )
        self.ratio = ratio
        self.target_macs = target_macs
        self.importance = scoring.check(importance)
        self.when = epochs(when)
        self.select = Select.of(select)
        # Lightning asks for the key on every hook of every step.
        self._key = self._generate_state_key(select=str(self.select))
        self.round_to = round_to
        self.recalibrate = recalibrate
        self.example = example
        self.receipt = Receipt()
        self.history: list[dict[str, Any]] = []
        self._trainer: Callable[[], Trainer | None] = lambda: None
        self._module: Callable[[], LightningModule | None] = lambda: None

    @property
    @override
    def state_key(self) -> str:
        return self._key

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"history": [dict(step) for step in self.history]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = list(state_dict["history"])

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        what = type(self).__name__
        guards.refuse_sharded(trainer.strategy, what)
        guards.refuse_spawn(trainer.strategy, what)
        last = trainer.max_epochs
        if not _is_trial(trainer) and last is not None and 0 <= last <= self.when[-1]:
            raise ValueError(
                explain(
                    "`when` names an epoch that this fit never reaches",
                    f"epoch {self.when[-1]}, counted from 0, with max_epochs={last}",
                    f"prune at epoch {last - 1} at the latest, or raise max_epochs",
                )
            )
        if self.importance == "taylor" and not pl_module.automatic_optimization:
            raise Unsupported(
                "importance='taylor' needs the loss that `training_step` returns",
                "a module with manual optimization",
                "use importance='magnitude'",
            )
        if any(True for _ in pl_module.parameters()):
            self.select.require(pl_module)
        if (trainer, pl_module) != (self._trainer(), self._module()):
            # Another fit; a second `trainer.fit` of the same model goes on where the first ended.
            self._trainer, self._module = weakref.ref(trainer), weakref.ref(pl_module)
            self.receipt, self.history = Receipt(), []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        guards.require_optimizer(trainer, type(self).__name__)
        self.select.require(pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rehearse, so that what cannot work is told now and not in the middle of the fit."""
        done = self._done()
        if done < len(self.when):
            self._decide(trainer, pl_module, done, len(self.when), scored=False)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = sum(epoch <= trainer.current_epoch for epoch in self.when)
        if _is_trial(trainer):  # a trial of everything in one epoch
            due = len(self.when)
        if due > self._done():
            self._prune(trainer, pl_module, self._done(), due)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `current_epoch` counts on before this hook.
        missed = [e for e in self.when[self._done() :] if e >= trainer.current_epoch]
        if missed and not _is_trial(trainer):
            rank_zero_warn(
                explain(
                    f"the fit ended before {type(self).__name__} had done all of its steps",
                    f"{self._done()} of {len(self.when)}, with epochs {missed} still to come",
                    "resume from a checkpoint of this fit, or prune earlier",
                )
            )

    def _done(self) -> int:
        return min(int(self.history[-1]["step"]), len(self.when)) if self.history else 0

    def _prune(self, trainer: Trainer, pl_module: LightningModule, done: int, due: int) -> None:
        before = sum(p.numel() for p in pl_module.parameters())
        try:
            cut = self._decide(trainer, pl_module, done, due)
        except NoEffect as error:  # rounding can put a step off, but not the whole
            if due == len(self.when) and not self.history:
                raise
            rank_zero_info(f"Nothing to prune before epoch {trainer.current_epoch}. {error}")
            return
        receipt = commit(trainer, pl_module, cut, lambda: self._statistics(trainer, pl_module))
        after = sum(p.numel() for p in pl_module.parameters())
        self.receipt = self.receipt + receipt
        self.history.append(
            {
                "step": due,
                "epoch": trainer.current_epoch,
                "params_before": before,
                "params_after": after,
                "skipped": {change.name: change.what for change in receipt.skipped},
            }
        )
        self._report(trainer, receipt, before, after)

    def _decide(
        self, trainer: Trainer, pl_module: LightningModule, done: int, due: int, scored: bool = True
    ) -> Cut:
        steps = len(self.when)
        macs = self.target_macs
        if macs is not None:
            macs = share_left(macs, due, steps) / share_left(macs, done, steps)
        taylor = scored and self.importance == "taylor"
        with isolate_rng():
            return plan(
                self._with_gradients(trainer, pl_module) if taylor else pl_module,
                calls=find_example(trainer, pl_module, self.example),
                ratio=None if self.ratio is None else self.ratio * due / steps,
                target_macs=macs,
                importance=self.importance if scored else "magnitude",
                select=self.select,
                round_to=self.round_to,
                dense=pristine(pl_module),
            )

    def _with_gradients(self, trainer: Trainer, pl_module: LightningModule) -> LightningModule:
        with inert_copy(trainer, pl_module) as copy:
            copy.zero_grad()
            for index, batch in enumerate(batches(trainer, _TAYLOR_BATCHES)):
                output = run_step(trainer, copy, batch, index)
                loss = output["loss"] if isinstance(output, dict) else output
                if not isinstance(loss, Tensor):
                    raise AccelError(
                        "importance='taylor' needs the loss that `training_step` returns",
                        type(output).__name__,
                        "return the loss, or use importance='magnitude'",
                    )
                loss.backward()
            return copy

    def _statistics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.recalibrate:
            return
        data = batches(trainer, self.recalibrate)
        for model in (pl_module, *averages(trainer.callbacks, pl_module)):  # type: ignore[attr-defined]
            # A copy runs: the user's hooks stay silent and nothing is compiled for it.
            copy = twin(model)
            with isolate_rng(), trainer.precision_plugin.train_step_context():
                recalibrate(copy, _prepared(trainer, pl_module, data))
            buffers = dict(copy.named_buffers())
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])

    def _report(self, trainer: Trainer, receipt: Receipt, before: int, after: int) -> None:
        left = after / before
        text = (
            f"Pruned before epoch {trainer.current_epoch}: {before:,} -> {after:,} parameters "
            f"({left:.0%}), {len(receipt.changes)} tensors."
        )
        for change in receipt.skipped:
            text += f"\n  left alone: `{change.name}`: {change.what}"
        rank_zero_info(text)
        for logger in trainer.loggers:
            logger.log_metrics(
                {"pruning/params": float(after), "pruning/params_left": left}, trainer.global_step
            )


def _is_trial(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


@torch.no_grad()
def _prepared(
    trainer: Trainer, pl_module: LightningModule, data: list[Any]
) -> Iterable[tuple[Call, ...]]:
    yield from calls_of(trainer, pl_module, data)
