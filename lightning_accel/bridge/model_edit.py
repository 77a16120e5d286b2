"""The base of callbacks whose edits of the model stay, and how an edit reaches all who hold the model.

An edit is decided on a copy, sent from rank 0 to all ranks, applied in place with the DDP wrapper
taken off, followed by optimizers and weight averages, and told to every callback of the Trainer that
has the hooks `on_model_edit_start(trainer, pl_module)` or
`on_model_edit_end(trainer, pl_module, receipt)`.
"""

from __future__ import annotations

import gc
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_accel.bridge import beside, bests
from lightning_accel.bridge.optimizers import (
    beside_blocks,
    hidden_beside,
    optimizers_of,
    refuse_empty,
    refuse_flat,
    refuse_unclear,
    shadows_of,
    unwatch,
    watch,
)
from lightning_accel.bridge.parts import following, forget_parts, note_parts, widened
from lightning_accel.bridge.restore import averages, pristine, remember
from lightning_accel.bridge.strategies import sizes_now
from lightning_accel.bridge.technique import Technique
from lightning_accel.errors import AccelError, explain
from lightning_accel.surgery import Cut, Receipt, Structure, follow
from lightning_accel.surgery.bypass import parameters_under
from lightning_accel.surgery.dropped import Dropped
from lightning_accel.surgery.shadows import Shadow, add_to_average

_LEFT: weakref.WeakKeyDictionary[LightningModule, Structure] = weakref.WeakKeyDictionary()
"""The sizes that the last cut of a fit left."""


class ModelEdit(Technique):
    """A technique whose edits stay, and are committed in mid-training."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            watch(pl_module)
            self.held(trainer).callback(_forget, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what is kept beside the weights, and refuse what no edit could follow."""
        refuse_flat(shadows_of(trainer, pl_module))
        note_parts(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make sure that what was cut stays so: weights kept elsewhere may have been put back."""
        refuse_grown(pl_module)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        _explain(trainer, pl_module, exception)
        super().on_exception(trainer, pl_module, exception)


def _forget(pl_module: LightningModule) -> None:
    """Drop what is known of a fit, at its end."""
    unwatch(pl_module)
    forget_parts(pl_module)
    forget_sizes(pl_module)


def forget_sizes(pl_module: LightningModule) -> None:
    """Expect no sizes any more, after a cut was taken back."""
    _LEFT.pop(pl_module, None)


def commit(
    trainer: Trainer,
    pl_module: LightningModule,
    cut: Cut,
    finish: Callable[[], None] | None = None,
) -> Receipt:
    """Apply a cut in mid-training on every rank, and let everyone who holds the model follow.

    Args:
        trainer: A Trainer at a step boundary.
        pl_module: The module to change.
        cut: What to take out; that of rank 0 is used everywhere.
        finish: Work on the edited module before it is wrapped again, such as statistics.
    """
    tell(trainer, "on_model_edit_start", pl_module)
    strategy = trainer.strategy
    wrapped = isinstance(strategy, DDPStrategy) and strategy.model is not pl_module
    if trainer.world_size > 1:
        cut = strategy.broadcast(cut)
    parts = following(trainer, pl_module, cut)
    cut = widened(cut, parts)
    if wrapped:
        strategy.model = pl_module
        gc.collect()  # the old wrapper's gradient accumulators know the old shapes
    remember(pl_module, cut.before)
    hidden = hidden_beside(trainer, pl_module)
    shadows = shadows_of(trainer, pl_module, hidden)  # while shapes still tell whose they are
    refuse_flat(shadows)
    parts_of_tensors = {name: (*kept.dims, kept.flat) for name, kept in cut.kept.items()}
    blocks = parameters_under(pl_module, cut.bypassed)
    refuse_unclear(shadows, parts_of_tensors | dict.fromkeys(blocks.values(), ()))
    refuse_empty(optimizers_of(trainer, pl_module, hidden), blocks)
    entries = beside_blocks(trainer, pl_module, blocks, shadows, hidden)
    in_parts = [(part.copy, part.cut(cut)) for part in parts if part.at is None]
    copies = list(averages(trainer.callbacks, pl_module))  # type: ignore[attr-defined]
    receipt = cut.apply(pl_module)
    beside.Cuts(pl_module).add(cut)
    for copy, its_own in in_parts:
        its_own.apply(copy)
    for average in copies:
        cut.apply(average)
    optimizers = optimizers_of(trainer, pl_module, hidden)
    _warn_of_resets(follow(optimizers, receipt))
    _add_to_slow_weights(optimizers, pl_module, cut.added)
    _tell_of_shadows(shadows.follow(cut.kept))
    Dropped(pl_module).add(entries)
    if finish is not None:
        finish()
    if wrapped:
        strategy.configure_ddp()  # type: ignore[attr-defined]
    _LEFT[pl_module] = pristine(pl_module).now(pl_module)
    bests.start_anew(trainer)
    tell(trainer, "on_model_edit_end", pl_module, receipt)
    return receipt


def _add_to_slow_weights(
    optimizers: Iterable[Any], pl_module: LightningModule, added: Mapping[str, Tensor]
) -> None:
    """Change what optimizers keep of weights in their state, as schedule-free ones do, as the weights were changed."""
    weights = dict(pl_module.named_parameters())
    for optimizer in optimizers:
        for name, change in added.items():
            state = optimizer.state.get(weights[name]) if name in weights else None
            for kept in state.values() if isinstance(state, Mapping) else ():
                if isinstance(kept, Tensor):
                    add_to_average(kept, weights[name], change)


def refuse_grown(pl_module: LightningModule) -> None:
    """Raise when weights have their shape of before a cut again, while the layers around them do not."""
    left = _LEFT.get(pl_module)
    if left is None or (found := sizes_now(left, pl_module)) == left:
        return
    names = [name for name, shape in left.tensors.items() if found.tensors.get(name) != shape]
    raise AccelError(
        "weights of before a prune were put back into the pruned network, by somebody who keeps "
        "copies where no edit could find them",
        ", ".join(names[:4]) or "other sizes of layers",
        "keep slow weights, averages and the like as attributes of the module, a callback or the optimizer",
    )


def tell(trainer: Trainer, hook: str, *args: Any) -> None:
    """Call a hook of ours on every callback that has it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        method = getattr(callback, hook, None)
        if method is not None:
            method(trainer, *args)


def _tell_of_shadows(cut: list[Shadow]) -> None:
    """Say what else was cut: a record that was to stay whole looks like an anchor."""
    counts = Counter(re.split(r"\[", shadow.where)[0] for shadow in cut)
    found = ", ".join(f"`{where}` ({count})" for where, count in list(counts.items())[:8])
    if found:
        rank_zero_info(f"Tensors kept beside the weights were cut along: {found}.")


def _explain(trainer: Trainer, pl_module: LightningModule, error: BaseException) -> None:
    """Say in an error about sizes who still keeps tensors of the dense network's, if somebody does."""
    text = str(error)
    left = _LEFT.get(pl_module)
    if left is None or isinstance(error, AccelError) or not re.search("size|shape|dimension", text):
        return
    dense = pristine(pl_module).tensors
    gone = {shape for name, shape in dense.items() if left.tensors.get(name) != shape}
    found = shadows_of(trainer, pl_module, hidden_beside(trainer, pl_module)).of_shape(gone)
    if found:
        error.args = (
            explain(
                "tensors of the network's sizes before its prune are kept where no edit could follow them",
                f"{text}; and such tensors at {', '.join(f'`{where}`' for where in found[:4])}",
                "keep them in a dict by the names of parameters, or renew them in "
                "`on_model_edit_end(trainer, pl_module, receipt)`",
            ),
        )


def _warn_of_resets(followed: Receipt) -> None:
    if followed.skipped:
        names = ", ".join(change.name for change in followed.skipped[:4])
        rank_zero_warn(
            f"{len(followed.skipped)} optimizer states could not follow the edit and start anew: "
            f"{names}. Found: state that is no number per element "
            f"({followed.skipped[0].before}). Do: nothing, or use an optimizer with elementwise state."
        )
