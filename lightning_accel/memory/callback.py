"""When to set the budget, when to checkpoint, and the proof that it saved memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from typing_extensions import override

from lightning_accel.bridge.example import AtHand, StepFailed, batches_or, run_step
from lightning_accel.bridge.guards import refuse_compiled, refuse_lazy, refuse_mirror
from lightning_accel.bridge.hand import Hand
from lightning_accel.bridge.inert import inert_copy
from lightning_accel.bridge.model_edit import ModelEdit
from lightning_accel.bridge.step import Around
from lightning_accel.errors import AccelError, NoEffect, Unsupported, explain
from lightning_accel.measure.subject import localise_norms
from lightning_accel.memory.budget import activation_budget, check_budget
from lightning_accel.memory.checkpoint import (
    check_arguments,
    checkpoint_activations,
    keep_activations,
    uncalled,
)
from lightning_accel.memory.saved import SavedTensors, standing
from lightning_accel.memory.trial import compile_for_trial, compiled_names, largest_budget
from lightning_accel.surgery import Receipt, Select, Stage
from lightning_accel.surgery.preserve import preserve_rng

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


class ActivationBudget(Callback):
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
        elif limit_bytes is not None:
            if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int):
                raise TypeError(
                    explain("`limit_bytes` is a number of bytes", repr(limit_bytes), "pass an int")
                )
            if limit_bytes <= 0:
                raise ValueError(
                    explain("`limit_bytes` is above zero", repr(limit_bytes), "pass bytes")
                )
        self.budget = budget
        self.limit_bytes = limit_bytes
        self.savings: Savings | None = None
        self._active = ExitStack()
        self._hand = Hand()
        self._step: _FirstStep | None = None
        self._plain_bytes: int | None = None
        self._limit = math.inf
        self._proved = self._anew = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_mirror(trainer)
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

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        refuse_lazy(pl_module, type(self).__name__)
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
        trial = _Trial(trainer, pl_module, names, at_hand)
        plain = trial(1.0)
        # Other techniques' terms of the loss are in the step that will be counted, and not in the trial.
        alone = "training_step" not in vars(pl_module)
        self._plain_bytes = int(plain) if alone and not math.isinf(plain) else None
        if self.budget == "auto":
            limit = trial.agree(self.limit_bytes or _room(trainer, pl_module), min)
            self._limit = limit
            chosen = largest_budget(lambda b: plain if b == 1 else trial(b), limit)
        else:
            chosen = float(self.budget)
        self.savings = Savings(chosen, 0, self._plain_bytes)
        self._active.enter_context(activation_budget(chosen))
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
        graphs, kept = (int(_of_all(trainer, count, max)) for count in step.finish())
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

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

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
        self._active.close()
        if self._step is not None:
            self._step.finish()
            self._step = None


class ActivationCheckpointing(ModelEdit):
    """Let blocks of the module recompute their activations in backward instead of keeping them.

    For training that is not compiled, or whose compiled parts shall not decide by themselves. Gradients
    are equal to the last bit, as some recomputations are compared to prove; what changes now and then between
    a forward and its backward (weights through `.data`, the input's own numbers) is seen only there. Inside a block
    that `torch.compile(backend="eager")` runs, torch itself draws dropout anew. After the fit the blocks keep their
    activations again.

    Args:
        select: Which blocks: a `Select`, a name pattern or several; by default those that repeat.
        policy: "full" keeps inputs of blocks alone; "selective" results of matrix products,
            convolutions and attention as well, so that recomputing is cheap.
        check_every: At how many calls of a block its recomputation is compared with its forward, besides
            the first, second, fourth, eighth ... One that begins to differ keeps its activations, with a warning.
            None for never.

    Raises:
        ValueError: Unknown policy, or `check_every` is below 1.
        NoEffect: Nothing matches, or what was chosen is not called in the first training step.
        Unsupported: In the first step, a block recomputes another result.

    >>> ActivationCheckpointing(select="net.layers.*", policy="selective").policy
    'selective'
    """

    stage: ClassVar[Stage] = Stage.MEMORY

    def __init__(
        self,
        select: Select | str | Iterable[str] | dict[str, Any] | None = None,
        *,
        policy: str = "full",
        check_every: int | None = 64,
    ) -> None:
        check_arguments(policy, check_every)
        self.select = None if select is None else Select.of(select)
        self.policy = policy
        self.check_every = check_every
        self.receipt = Receipt()
        self._unproved = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.receipt = Receipt()
        if stage == "fit" and any(True for _ in pl_module.parameters()):
            self._edit(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._edit(pl_module)
        blocks = len(self.receipt.changes)
        rank_zero_info(
            f"ActivationCheckpointing: {blocks} blocks recompute, {self.policy}: "
            f"{', '.join(change.name for change in self.receipt.changes[:4])}"
            f"{', ...' if blocks > 4 else ''}."
        )

    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Checkpoint what another edit put in a block's place."""
        self._edit(pl_module)

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._unproved:
            return
        self._unproved = False
        left = uncalled(pl_module)
        if left and not compiled_names(pl_module):  # compiled code calls without our notice
            raise NoEffect(
                f"checkpointing `{', '.join(left[:4])}` had no effect",
                "the first training step did not call it as a module",
                "select the modules that are called, such as 'net.layers.*'",
            )

    @override
    def _leave(self, pl_module: LightningModule) -> None:
        """Undo what this callback did, and leave what the user had checkpointed before."""
        super()._leave(pl_module)
        for change in self.receipt.changes:
            keep_activations(pl_module.get_submodule(change.name))

    def _edit(self, pl_module: LightningModule) -> None:
        receipt = checkpoint_activations(
            pl_module, select=self.select, policy=self.policy, check_every=self.check_every
        )
        self.receipt = self.receipt + receipt
        self._unproved = self._unproved or bool(receipt)


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


class _Trial:
    """Runs the user's step on copies under a budget; all processes take part, and the fullest one counts."""

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        names: list[str],
        at_hand: AtHand | None,
    ) -> None:
        self._trainer, self._module, self._names = trainer, pl_module, names
        self._batch = batches_or(trainer, 1, at_hand)[0]

    def __call__(self, budget: float) -> float:
        """Return the bytes kept for backward; infinite where they do not fit."""
        return self.agree(self._bytes(budget), max)

    def agree(self, value: float, choose: Any) -> float:
        """Return the same on all processes."""
        return _of_all(self._trainer, value, choose)

    def _bytes(self, budget: float) -> float:
        with preserve_rng(), inert_copy(self._trainer, self._module) as copy:
            localise_norms(copy)
            compile_for_trial(copy, self._names)
            try:
                with activation_budget(budget), SavedTensors() as saved:
                    output = run_step(self._trainer, copy, self._batch, 0)
            except StepFailed as error:
                if isinstance(error.__cause__, torch.OutOfMemoryError):
                    return math.inf
                raise AccelError(
                    "the activations could not be counted on a copy of the module",
                    str(error.__cause__),
                    "see the cause above; `ActivationCheckpointing` needs no trial",
                ) from error.__cause__
            del output
            return float(saved.count(standing(copy)))


def _room(trainer: Trainer, pl_module: LightningModule) -> float:
    """Return how many bytes of CUDA memory activations may take."""
    device = trainer.strategy.root_device
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    learning = [p for p in pl_module.parameters() if p.requires_grad]
    to_come = sum(p.numel() * p.element_size() for p in learning if p.grad is None)
    for optimizer in trainer.optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not optimizer.state:  # two moments, as of Adam; less for others
            to_come += 2 * sum(p.numel() * p.element_size() for p in learning if id(p) in held)
    return 0.9 * free - to_come


def _of_all(trainer: Trainer, value: float, choose: Any) -> float:
    if trainer.world_size == 1:
        return value
    gathered: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, value)
    return float(choose(gathered))


def _num_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _nothing_compiled() -> NoEffect:
    return NoEffect(
        "an activation budget acts on compiled code alone",
        "no graph was compiled in the training",
        "add BlockCompile(), or use ActivationCheckpointing() without compiling",
    )
