"""`ActivationCheckpointing`: blocks that recompute their activations while a fit runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_accel.bridge.technique import Context, Technique
from lightning_accel.errors import NoEffect
from lightning_accel.memory.checkpoint import (
    check_arguments,
    checkpoint_activations,
    keep_activations,
    uncalled,
)
from lightning_accel.memory.on_xla import refuse_on_xla
from lightning_accel.memory.trial import compiled_names
from lightning_accel.surgery import Receipt, Select, Stage


class ActivationCheckpointing(Technique):
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
        check_every_n_calls: At how many calls of a block its recomputation is compared with its forward, besides
            the first, second, fourth, eighth ... One that begins to differ keeps its activations, with a warning.
            None for never.

    Raises:
        ValueError: Unknown policy, or `check_every_n_calls` is below 1.
        NoEffect: Nothing matches, or what was chosen is not called in the first training step.
        Unsupported: In the first step, a block recomputes another result.

    >>> ActivationCheckpointing(select="net.layers.*", policy="selective").policy
    'selective'
    """

    needs = "weights"
    stage: ClassVar[Stage] = Stage.MEMORY
    acts_in = ("fit",)

    def __init__(
        self,
        select: Select | str | Iterable[str] | dict[str, Any] | None = None,
        *,
        policy: str = "full",
        check_every_n_calls: int | None = 64,
    ) -> None:
        check_arguments(policy, check_every_n_calls)
        self.select = None if select is None else Select.of(select)
        self.policy = policy
        self.check_every_n_calls = check_every_n_calls
        self._unproved = False

    @override
    @contextmanager
    def effect(self, context: Context) -> Iterator[Receipt]:
        receipt = checkpoint_activations(
            context.module,
            select=self.select,
            policy=self.policy,
            check_every_n_calls=self.check_every_n_calls,
        )
        self._unproved = self._unproved or bool(receipt)
        try:
            if context.trainer.strategy.root_device.type == "xla":
                names = [change.name for change in receipt.changes]
                refuse_on_xla(context.module, names, self.policy)
            yield receipt
        finally:
            # What was made by this effect alone: the user may have checkpointed some before.
            for change in receipt.changes:
                keep_activations(context.module.get_submodule(change.name))

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        blocks = len(self.receipt.changes)
        rank_zero_info(
            f"ActivationCheckpointing: {blocks} blocks recompute, {self.policy}: "
            f"{', '.join(change.name for change in self.receipt.changes[:4])}"
            f"{', ...' if blocks > 4 else ''}."
        )

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if not self._unproved:
            return
        self._unproved = False
        left = uncalled(pl_module)
        if self.select is None and len(left) < len(self.receipt.changes):
            # A frozen reference runs without gradients, and keeps nothing: nobody asked for it.
            left = [n for n in left if _learns(pl_module.get_submodule(n))]
        if left and not compiled_names(pl_module):  # compiled code calls without our notice
            rests = not any(pl_module.get_submodule(name).training for name in left)
            raise NoEffect(
                f"checkpointing `{', '.join(left[:4])}` had no effect",
                "it is in evaluation mode, in which activations are kept"
                if rests
                else "the first training step did not call it as a module",
                "leave it out by `select=Select(exclude=...)`"
                if rests
                else "select the modules that are called, such as 'net.layers.*'",
            )


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())
