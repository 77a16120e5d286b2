"""`ActivationBudget`: compiled parts keep a share of their activations, and the proof that this saved memory."""

from __future__ import annotations

import math
import weakref
from contextlib import AbstractContextManager, suppress
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_accel.arguments import share, whole
from lightning_accel.bridge.checks import refuse_compiled, refuse_lazy
from lightning_accel.bridge.example import AtHand
from lightning_accel.bridge.hand import Hand
from lightning_accel.bridge.step import Around
from lightning_accel.bridge.strategies import holding
from lightning_accel.bridge.technique import Context, Technique
from lightning_accel.errors import NoEffect, Unsupported, explain
from lightning_accel.memory.budget import activation_budget, check_budget
from lightning_accel.memory.callbacks.trial import BudgetTrial, of_all, room
from lightning_accel.memory.saved import SavedTensors, standing
from lightning_accel.memory.trial import compiled_names, largest_budget
from lightning_accel.surgery import Receipt

_compiled_with: weakref.WeakKeyDictionary[nn.Module, float] = weakref.WeakKeyDictionary()
"""The budget that the graphs of a module were made with."""


class Savings(NamedTuple):
    """Bytes kept for backward by one training step of the fullest process, with the budget and without.

    `plain_bytes` is of the same network compiled without a budget; `None` where that does not fit.
    """

    budget: float
    kept_bytes: int
    plain_bytes: int | None

    @property
    def ratio(self) -> float | None:
        """What is kept, as a share of what would be kept without.

        >>> Savings(0.5, 51, 100).ratio
        0.51
        """
        return self.kept_bytes / self.plain_bytes if self.plain_bytes else None


class ActivationBudget(Technique):
    """Let the compiled parts of the module keep only a share of their activations for backward.

    For networks that `BlockCompile` or `torch.compile` compiles; the rest stays as it is. The budget holds
    from the start of the fit to its end, also for what is compiled anew after a prune or for another batch
    size, and is taken back then. In the first training step the bytes that are kept are counted, and
    compared with those of a trial without budget on a copy. Gradients stay right, dropout included, which
    torch's own setting does not ensure: see `memory.budget`.

    Args:
        budget: A share from 0 to below 1; or "auto" for the largest one that fits, in steps of 0.05.
        limit_bytes: For "auto", what the fullest process may keep for backward in a step. By default, on
            CUDA, nine tenths of the free memory less gradients and optimizer states still to come.

    Raises:
        TypeError: An argument is not what it has to be.
        ValueError: A budget outside of its range, or a limit without "auto".
        NoEffect: The first training step compiled nothing, or kept as much as without a budget.
        AccelError: With "auto", at the start: even a budget of 0 does not fit.

    >>> ActivationBudget(0.5).budget
    0.5
    """

    acts_in = ("fit",)
    is_global = True
    of_a_fit: ClassVar = {"_hand": Hand, "_step": type(None)}
    name = "memory"

    def __init__(self, budget: float | str = 0.5, *, limit_bytes: int | None = None) -> None:
        if budget != "auto":
            check_budget(budget)
            if budget == 1:
                raise ValueError(
                    explain("a budget of 1 changes nothing", "1", "pass a smaller one, or 'auto'")
                )
            if limit_bytes is not None:
                raise ValueError(
                    explain("`limit_bytes` is for budget='auto'", repr(budget), "drop one of them")
                )
        whole("limit_bytes", limit_bytes, none=True, do="pass a number of bytes")
        self.budget = budget
        self.limit_bytes = limit_bytes
        self.savings: Savings | None = None
        self._chosen = 1.0
        self._hand = Hand()
        self._step: _FirstStep | None = None
        self._plain_bytes: int | None = None
        self._limit = math.inf
        self._proved = self._anew = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        refuse_compiled(pl_module)
        if stage != "fit":
            return
        on_cuda = trainer.strategy.root_device.type == "cuda"
        if self.budget == "auto" and self.limit_bytes is None and not on_cuda:
            raise Unsupported(
                "budget='auto' finds out how much memory is free on CUDA alone",
                f"a Trainer on {trainer.strategy.root_device.type}",
                "pass `limit_bytes=`, what may be kept for backward, or a budget such as 0.5",
            )
        self.savings, self._plain_bytes = None, None
        self._proved = self._anew = False
        self.held(trainer).callback(self._release)

    @override
    @classmethod
    def arguments(cls, value: str) -> dict[str, Any]:
        with suppress(ValueError):
            return {"budget": share(cls.name, float(value))}
        raise ValueError(explain("`memory` lies from 0 to 1", repr(value), "pass '0.5'"))

    @override
    @classmethod
    def describe(cls, value: str) -> str:
        return f"memory budget {value}"

    @override
    def effect(self, context: Context) -> AbstractContextManager[None]:
        return activation_budget(self._chosen if self.budget == "auto" else float(self.budget))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_lazy(pl_module, type(self).__name__)
        if holding(trainer.strategy) == "sharded":
            raise Unsupported(
                "what is kept for backward is counted on whole weights, and gathered ones come and go",
                type(trainer.strategy).__name__,
                "use ActivationCheckpointing(), which needs no count, or train with one device or DDP",
            )
        names = compiled_names(pl_module)
        if self.budget == "auto" and not names:
            raise _nothing_compiled()
        self._hand.do(partial(self._begin, trainer, pl_module, names))

    def _begin(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        names: list[str],
        at_hand: AtHand | None,
    ) -> None:
        trial = BudgetTrial(trainer, pl_module, names, at_hand)
        plain = trial(1.0)
        # Other techniques' terms of the loss are in the step that will be counted, and not in the trial.
        alone = "training_step" not in vars(pl_module)
        self._plain_bytes = int(plain) if alone and not math.isinf(plain) else None
        if self.budget == "auto":
            limit = trial.agree(self.limit_bytes or room(trainer, pl_module), min)
            self._limit = limit
            chosen = largest_budget(lambda b: plain if b == 1 else trial(b), limit)
        else:
            chosen = float(self.budget)
        self.savings, self._chosen = Savings(chosen, 0, self._plain_bytes), chosen
        self.enter(trainer, pl_module)
        self._step = _FirstStep(pl_module)
        if chosen == 1:
            rank_zero_info(
                f"ActivationBudget: all activations fit, {plain:,.0f} bytes in a step; the budget is 1."
            )

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._hand.take(batch)

    @override
    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Count again after another edit, when the graphs are made anew."""
        if self._step is None and self._proved:
            self._plain_bytes = None
            self._step = _FirstStep(pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._hand.drop()
        if self._step is None or self.savings is None:
            return
        step, self._step = self._step, None
        budget = self.savings.budget
        graphs, kept = (int(of_all(trainer, count, max)) for count in step.finish())
        present = _compiled_with.get(pl_module, 1.0 if budget == 1 else None)
        if not graphs and not self._proved and present != budget:
            self._without_graphs(pl_module)
            return
        plain = self._plain_bytes
        if not self._proved and budget < 1 and plain is not None and kept >= plain:
            raise NoEffect(
                f"an activation budget of {budget} saved nothing",
                f"{kept:,} bytes kept for backward, and {plain:,} without a budget",
                "compile with backend='inductor', take a smaller budget, or use ActivationCheckpointing()",
            )
        self._proved = True
        _compiled_with[pl_module] = budget
        self.savings = Savings(budget, kept, self._plain_bytes)
        self._tell(trainer)

    def _without_graphs(self, pl_module: LightningModule) -> None:
        """Once, let what was compiled before this fit compile anew; then give up."""
        if self._anew or not compiled_names(pl_module):
            raise _nothing_compiled()
        self._anew = True
        torch._dynamo.reset()  # other modules compile again at their next call as well
        self._step = _FirstStep(pl_module)

    def _tell(self, trainer: Trainer) -> None:
        assert self.savings is not None
        budget, kept, plain = self.savings
        beside = f", {kept / plain:.2f} of the {plain:,} without" if plain else ""
        rank_zero_info(
            f"ActivationBudget: with {budget}, {kept:,} bytes are kept for backward{beside}."
        )
        if kept > 1.05 * self._limit:
            rank_zero_warn(
                explain(
                    "the step keeps more for backward than a trial on a copy did",
                    f"{kept:,} bytes with a limit of {self._limit:,.0f}",
                    "compile with backend='inductor', which the trial stands for, or lower the limit",
                )
            )
        values = {"memory/budget": budget, "memory/kept_bytes": float(kept)}
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)

    def _release(self) -> None:
        self._hand.clear()
        if self._step is not None:
            self._step.finish()
            self._step = None


class _FirstStep:
    """Counts graphs and kept bytes of a training step, in place."""

    def __init__(self, pl_module: LightningModule) -> None:
        self._module = pl_module
        self._saved = SavedTensors()
        self._graphs = _num_graphs()
        self._around = Around(pl_module, "training_step", self._count)

    def finish(self) -> tuple[int, int]:
        """Take off the hooks and return the number of graphs and the bytes."""
        self._around.remove()
        return _num_graphs() - self._graphs, self._saved.count(standing(self._module))

    def _count(self, training_step: Any, *args: Any, **kwargs: Any) -> Any:
        self._saved = SavedTensors()  # of an earlier batch of the same step, if any
        with self._saved:
            return training_step(*args, **kwargs)


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _nothing_compiled() -> NoEffect:
    return NoEffect(
        "an activation budget acts on compiled code alone",
        "no graph was compiled in the training",
        "add BlockCompile(), or use ActivationCheckpointing() without compiling",
    )
