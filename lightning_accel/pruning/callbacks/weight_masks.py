"""When single weights are masked: before an epoch of a fit, and held from then on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_accel.arguments import one_of
from lightning_accel.bridge import checks
from lightning_accel.bridge.optimizers import (
    hidden_beside,
    optimizers_of,
    refuse_unclear,
    shadows_of,
)
from lightning_accel.bridge.restore import averages
from lightning_accel.bridge.strategies import gathers, in_parts, layout, on_whole
from lightning_accel.bridge.technique import Technique
from lightning_accel.changed import changed, in_vain, written
from lightning_accel.errors import explain
from lightning_accel.pruning import masks as masking
from lightning_accel.pruning.schedule import When, epochs, moments, require_reached
from lightning_accel.surgery import Receipt, Select
from lightning_accel.surgery.mirrors import mirrored
from lightning_accel.surgery.optimizers import Steps


class WeightMasks(Technique):
    """Keep chosen single weights at zero during a fit, whatever the optimizer does.

    Masks are decided once, on the whole module, are equal on all ranks, travel in checkpoints as plain boolean tensors, and
    are cut along when `StructuredPruning` cuts the network. Weight averages are masked too. The saved
    weights are ordinary ones that are zero: nothing of this package is needed to load them.

    Args:
        amount: Share of the weights to mask, above 0 and below 1; the smallest ones.
        pattern: Instead of `amount`, "2:4": the smaller two of every four neighbouring inputs.
        scope: With `amount`, "local" (this share of each layer) or "global" (of all together).
        when: Epoch before which to mask, counted from 0; or the share of the fit (0.4 of 20 epochs is epoch 8).
        select: Layers to mask: a `Select`, a name pattern or several. All linear layers and
            convolutions by default.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.

    >>> WeightMasks(pattern="2:4", when=3).when
    3
    """

    acts_in = ("fit",)
    of_a_fit: ClassVar = {
        "_handles": list,
        "_steps": type(None),
        "_parts": dict,
        "_made_for": list,
    }

    def __init__(
        self,
        amount: float | None = None,
        *,
        pattern: masking.Pattern | None = None,
        scope: masking.Scope = "local",
        when: float = 0,
        select: Select | str | Sequence[str] | dict[str, Any] | None = None,
    ) -> None:
        if (amount is None) == (pattern is None):
            raise ValueError(
                explain(
                    "masks take either `amount` or `pattern`",
                    f"amount={amount!r}, pattern={pattern!r}",
                    "pass one of the two",
                )
            )
        self.amount = None if amount is None else masking.check_amount(amount)
        self.pattern = None if pattern is None else one_of("pattern", pattern, masking.PATTERNS)
        self.scope: masking.Scope = one_of("scope", scope, masking.SCOPES)
        self._when: When = _one(moments(when))
        self.select = Select.of(select)
        # Lightning asks for the key on every hook of every step.
        self._key = self._generate_state_key(select=str(self.select))
        self._settings = written(
            {"amount": amount, "pattern": pattern, "scope": scope, "when": self._when[0]}
        )
        self._before: dict[str, str] = {}  # settings of the fit that a checkpoint comes from
        self.masks: dict[str, Tensor] = {}
        self._resting: dict[str, Tensor] = {}  # of whole blocks that are gone
        self._handles: list[RemovableHandle] = []
        self._steps: Steps | None = None
        self._parts: dict[str, Tensor] = {}  # of the masks, where weights are in parts
        self._made_for: list[object] = []

    @property
    def when(self) -> float:
        """The epoch before which weights are masked, or the share of the fit."""
        return self._when[0]

    @property
    @override
    def state_key(self) -> str:
        return self._key

    @override
    def state_dict(self) -> dict[str, Any]:
        masks = {name: keep.cpu() for name, keep in {**self.masks, **self._resting}.items()}
        return {"masks": masks, "settings": dict(self._settings)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.masks = dict(state_dict["masks"])
        self._before = dict(state_dict.get("settings", {}))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        checks.refuse_sharded(
            trainer.strategy, type(self).__name__, unless_gathered=True, cuts=False
        )
        if not checks.is_trial(trainer):
            require_reached(epochs(self._when, trainer.max_epochs), trainer.max_epochs)
        self.masks, self._before = {}, {}
        self._resting = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.select.require(pl_module)
        self._hold(trainer, pl_module)
        self._parts, self._made_for = {}, []
        if self.masks:  # resumed
            difference = changed(self._before, self._settings)
            if difference:
                happens = "the masks of the checkpoint stay as they are"
                rank_zero_warn(in_vain(type(self).__name__, difference, happens))
            self._apply(trainer, pl_module, self.masks)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._decide_when_due(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Lightning leaves out the epoch's start after a resume from the last step of an epoch.
        if batch_idx == 0:
            self._decide_when_due(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        masking.hold_gradients(pl_module, self._mine(trainer, pl_module))

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # What steps without being an optimizer of torch, or writes weights by hand.
        if self.masks:
            masking.apply_masks(pl_module, self._mine(trainer, pl_module), count=False)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.leave(trainer)

    @override
    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Cut the masks along with the network, and put a pattern back that the cut took apart."""
        masks = {**self.masks, **self._resting}
        if not masks:
            return
        followed = masking.follow_masks(pl_module, masks, receipt)
        keep, skipped = followed.keep, followed.skipped
        if self.pattern is not None:
            again = masking.restored(pl_module, keep, pattern=self.pattern)
            keep, skipped = again.keep, skipped + again.skipped
        if skipped:
            rank_zero_warn(
                explain(
                    f"{len(skipped)} masks could not follow the edit",
                    "; ".join(f"`{change.name}`: {change.what}" for change in skipped[:4]),
                    "round the kept channels to a multiple of 4, or mask after the last prune",
                )
            )
        self._apply(trainer, pl_module, keep)

    def _decide_when_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = trainer.current_epoch >= epochs(self._when, trainer.max_epochs)[0] or checks.is_trial(
            trainer
        )
        if due and not self.masks and not self._resting:
            self._decide(trainer, pl_module)

    @on_whole
    def _decide(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checks.refuse_lazy(pl_module, type(self).__name__)
        if self.pattern is not None:
            found = masking.pattern_masks(pl_module, pattern=self.pattern, select=self.select)
        else:
            assert self.amount is not None
            found = masking.magnitude_masks(
                pl_module, amount=self.amount, select=self.select, scope=self.scope
            )
        if trainer.world_size > 1:
            found = trainer.strategy.broadcast(found)
        for optimizer in optimizers_of(trainer, pl_module):
            if isinstance(optimizer, LBFGS):  # one flat history, that of the dense network
                optimizer.state.clear()
        receipt = self._apply(trainer, pl_module, found.keep)
        self.receipt = Receipt(receipt.changes, skipped=found.skipped)
        self._report(trainer)

    @on_whole
    def _apply(
        self, trainer: Trainer, pl_module: LightningModule, keep: dict[str, Tensor]
    ) -> Receipt:
        present = dict(pl_module.named_parameters(remove_duplicate=False))
        self._resting = {name: mask for name, mask in keep.items() if name not in present}
        self.masks = {n: mask.to(pl_module.device) for n, mask in keep.items() if n in present}
        self._made_for = []
        receipt = masking.apply_masks(pl_module, self.masks)
        self._unhook()
        if not gathers(trainer.strategy):  # gradients of shards come past hooks of weights
            # From the backward on, since SAM and the like read gradients before any step.
            self._handles = masking.mask_gradients(pl_module, self.masks)
        hidden = hidden_beside(trainer, pl_module)
        for optimizer in optimizers_of(trainer, pl_module, hidden):
            masking.hold(pl_module, self.masks, optimizer)
        shadows = shadows_of(trainer, pl_module, hidden)
        refuse_unclear(shadows, {name: (mask,) for name, mask in self.masks.items()})
        for shadow in shadows:
            if shadow.name in self.masks:
                gone = ~self.masks[shadow.name].to(shadow.tensor.device)
                shadow.tensor.data.masked_fill_(gone, 0.0)
        for name, of in mirrored(pl_module).items():
            if of in self.masks:
                pl_module.get_buffer(name).masked_fill_(~self.masks[of], 0.0)
        for average in averages(trainer.callbacks, pl_module):  # type: ignore[attr-defined]
            masking.apply_masks(average, self.masks)
        return receipt

    def _mine(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Return what this process holds of the masks: its parts, where weights are in parts."""
        if not self.masks or not gathers(trainer.strategy):
            return self.masks
        named = dict(pl_module.named_parameters(remove_duplicate=False))
        weights: list[object] = [named[name] for name in self.masks]  # gathered ones are others
        weights.append(layout(trainer))
        if any(a is not b for a, b in zip_longest(weights, self._made_for)):
            self._parts, self._made_for = in_parts(trainer, self.masks), weights
        return self._parts

    def _hold(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let every step of every optimizer end with the masks, in manual optimization too."""
        self.leave(trainer)
        self.held(trainer).callback(self._release)
        self._steps = Steps(
            pl_module.parameters,
            lambda optimizer: masking.hold(pl_module, self._mine(trainer, pl_module), optimizer),
        )

    def _release(self) -> None:
        if self._steps is not None:
            self._steps.stop()
        self._steps = None
        self._parts, self._made_for = {}, []
        self._unhook()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _report(self, trainer: Trainer) -> None:
        share = masking.zero_share(self.masks)
        text = (
            f"Masked before epoch {trainer.current_epoch}: {share:.0%} of the weights of "
            f"{len(self.masks)} layers stay zero."
        )
        for change in self.receipt.skipped:
            text += f"\n  left alone: `{change.name}`: {change.what}"
        rank_zero_info(text)
        for logger in trainer.loggers:
            logger.log_metrics({"pruning/weights_masked": share}, trainer.global_step)


def _one(when: When) -> When:
    """Return the only moment; masks are decided once.

    Raises:
        ValueError: There are several.
    """
    if len(when) > 1:
        raise ValueError(
            explain(
                "masks are decided once",
                f"when={list(when)}",
                "pass one epoch or one share, or a `WeightMasks` each with a `select` of its own",
            )
        )
    return when
