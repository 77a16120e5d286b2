"""Around the prunes of a fit: sparse training by a pruner of torch-pruning before the first, a report after each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_accel.bridge.copies import renew_buffers
from lightning_accel.bridge.example import AtHand, batches_or, calls_of, find_example
from lightning_accel.bridge.hand import Hand
from lightning_accel.bridge.restore import pristine
from lightning_accel.errors import Unsupported, explain
from lightning_accel.pruning.foreign import Pruner
from lightning_accel.pruning.recalibrate import recalibrate
from lightning_accel.pruning.regularizer import Regularizer
from lightning_accel.pruning.trained import little_left
from lightning_accel.pruning.trains import in_dtype_of
from lightning_accel.surgery import Receipt
from lightning_accel.surgery.bypass import whole_tensors
from lightning_accel.surgery.call import first
from lightning_accel.surgery.optimizers import Steps
from lightning_accel.surgery.preserve import preserve_rng

_SAMPLES = 2  # enough to trace


class SparseTraining:
    """Adds what a pruner's `regularize` adds, each time before an optimizer steps.

    Args:
        pruner: The user's function; without one, nothing is ever added.
        example: Arguments of the module's forward, if the user gave some.
    """

    def __init__(self, pruner: Pruner | None, example: Any) -> None:
        self._pruner = pruner
        self._example = example
        self._hand = Hand()
        self._loaded: list[Tensor] = []
        self._regularizer: Regularizer | None = None
        self._steps: Steps | None = None
        self._stepped = self._added = False

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace the module, now or at the first batch of data that can be read only once."""
        self.end()
        if self._pruner is not None:
            self._hand.do(partial(self._begin, self._pruner, trainer, pl_module))

    def _begin(
        self,
        pruner: Pruner,
        trainer: Trainer,
        pl_module: LightningModule,
        at_hand: AtHand | None,
    ) -> None:
        with preserve_rng():
            found = find_example(trainer, pl_module, self._example, at_hand)
            calls = in_dtype_of(first(found, _SAMPLES), pl_module)
            regularizer = Regularizer(pruner, pl_module, calls)
        if not regularizer.acts:
            regularizer.end()
            return
        regularizer.load(self._loaded)
        self._regularizer = regularizer
        self._steps = Steps(pl_module.parameters, self._note_step)
        rank_zero_info("StructuredPruning: the pruner's regularizer acts until the first prune.")

    @property
    def acts(self) -> bool:
        return self._regularizer is not None

    def batch_begins(self, batch: Any) -> None:
        if self._pruner is not None:
            self._hand.take(batch)

    def before_step(self, trainer: Trainer, optimizer: Optimizer) -> None:
        """Add to the gradients that an optimizer is about to step with: all are there, none is clipped."""
        if self._regularizer is None:
            return
        held = [p for group in optimizer.param_groups for p in group["params"]]
        odd = self._regularizer.add(held, scale=_scale(trainer, optimizer))
        self._added = True
        if odd:
            rank_zero_warn(
                explain(
                    "the regularizer of torch-pruning gives no numbers for some channels, and is left out there",
                    ", ".join(odd[:4]),
                    "put layers of one channel among `ignored_layers`",
                )
            )

    def batch_ends(self) -> None:
        """Raise if an optimizer was stepped past the regularizer."""
        self._hand.drop()
        missed, self._stepped, self._added = self._stepped and not self._added, False, False
        if missed and self._regularizer is not None:
            raise Unsupported(
                "the regularizer cannot reach an optimizer that is stepped past Lightning",
                "a step of which `on_before_optimizer_step` was not told",
                "step what `self.optimizers()` returns, not the optimizer inside it or one of your own",
            )

    def epoch_ends(self) -> None:
        if self._regularizer is not None:
            self._regularizer.grow()

    def end(self) -> None:
        """Let go of the trace, but not of how strong it has grown."""
        self._hand.clear()
        if self._regularizer is not None:
            self._loaded = self._regularizer.state()
            self._regularizer.end()
        if self._steps is not None:
            self._steps.stop()
        self._steps = self._regularizer = None
        self._stepped = self._added = False

    def state(self) -> list[Tensor]:
        return self._loaded if self._regularizer is None else self._regularizer.state()

    def load(self, state: Sequence[Tensor]) -> None:
        self._loaded = list(state)

    def _note_step(self, _: Any) -> None:
        self._stepped = True


def _scale(trainer: Trainer, optimizer: Optimizer) -> float:
    """Return what gradients are multiplied with now: an optimizer that unscales by itself does so in its step."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return 1.0
    return float(scaler.get_scale())


def report(
    trainer: Trainer,
    pl_module: LightningModule,
    receipt: Receipt,
    before: int,
    target: tuple[str, float] | None,
) -> None:
    """Tell what a prune did, and log how many parameters are left; warn of few."""
    after = sum(p.numel() for p in pl_module.parameters())
    blocks = [change.name for change in receipt.changes if change.what == "removed"]
    values = {"pruning/params": float(after), "pruning/params_left": after / before}
    text = (
        f"Pruned before epoch {trainer.current_epoch}: {before:,} -> {after:,} parameters "
        f"({after / before:.0%}), {len({c.name for c in receipt.changes if c.what == 'pruned'})} tensors."
    )
    if blocks:
        text += f"\n  whole blocks: {', '.join(f'`{name}`' for name in blocks)}"
    if target is not None:
        values["pruning/target_left"] = target[1]
        text += f"\n  {target[0]}"
    for change in receipt.skipped:
        text += f"\n  left alone: `{change.name}`: {change.what}"
    for note in receipt.notes[1:]:  # the first says how much is gone
        text += f"\n  {note}"
    rank_zero_info(text)
    for logger in trainer.loggers:
        logger.log_metrics(values, trainer.global_step)
    warning = little_left(after, _dense_params(pl_module))
    if warning:
        rank_zero_warn(warning)


def renew(
    trainer: Trainer, pl_module: LightningModule, num_batches: int, at_hand: AtHand | None
) -> None:
    """Estimate the statistics of norms anew after a prune, from training batches; from none, keep them."""
    if num_batches:
        data = batches_or(trainer, num_batches, at_hand)
        calls = partial(calls_of, trainer, pl_module, data)
        renew_buffers(trainer, pl_module, lambda copy: recalibrate(copy, calls()))


def _dense_params(pl_module: LightningModule) -> int:
    dense = pristine(pl_module).tensors
    whole = {id(p): (n, p) for n, p in whole_tensors(pl_module) if isinstance(p, nn.Parameter)}
    return sum(math.prod(dense[n]) if n in dense else p.numel() for n, p in whole.values())
