"""`FusedOptimizer`: optimizers of a fit in one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_accel.bridge.strategies import is_of
from lightning_accel.bridge.technique import Context, Situation, Skipped, Technique
from lightning_accel.errors import NoEffect, Unsupported
from lightning_accel.loop.fused import Original, check, sparse_weights, use_implementation
from lightning_accel.loop.layout import Layout
from lightning_accel.surgery import Change, Receipt


class FusedOptimizer(Technique):
    """Let the optimizers of a fit run in one kernel, or in another implementation of `torch.optim`.

    Weights and state are those of the loop, to rounding, and checkpoints are as without this: they say
    nothing of the implementation, so that they continue anywhere. Gradient clipping works under mixed
    precision, bf16 or fp16. After the fit the optimizers run as they were built.

    Args:
        implementation: "fused", "foreach" or "for-loop".

    Raises:
        ValueError: The name is unknown.
        NoEffect: At the start of the fit, when no optimizer can run so; the message has the reasons.

    >>> FusedOptimizer().implementation
    'fused'
    """

    needs = "optimizers"
    acts_in = ("fit",)
    of_a_fit: ClassVar = {"_optimizers": list, "_layout": Layout}
    name = "fused_optimizer"
    tunable: ClassVar = {name: {"implementation": name} for name in ("fused", "foreach")}

    def __init__(self, implementation: str = "fused") -> None:
        self.implementation = check(implementation)
        self._optimizers: list[Optimizer] = []
        self._layout = Layout()

    @override
    @classmethod
    def candidates(cls, situation: Situation) -> Iterator[str | Skipped]:
        optimizers = situation.trainer.optimizers
        for value in cls.tunable:
            if not optimizers or not all(value in o.defaults for o in optimizers):
                names = ", ".join(sorted({type(o).__name__ for o in optimizers})) or "none"
                yield Skipped(value, f"no such implementation of {names}")
            elif all(group.get(value) for o in optimizers for group in o.param_groups):
                yield Skipped(value, "set already")
            else:
                yield value

    @override
    @classmethod
    def describe(cls, value: str) -> str:
        return f"{value} optimizer"

    @override
    @contextmanager
    def effect(self, context: Context) -> Iterator[Receipt]:
        held = _Held(self.implementation, self._layout)
        receipt = Receipt()
        try:
            for index, optimizer in enumerate(context.optimizers):
                try:
                    receipt = receipt + held.take(context, optimizer)
                except (NoEffect, Unsupported) as error:
                    name = f"{type(optimizer).__name__}, optimizer {index}"
                    skipped = Change(name, "left as it is", after=str(error))
                    receipt = receipt + Receipt(skipped=(skipped,))
            self._optimizers = [optimizer for optimizer, _ in held.originals]
            if not held.originals:
                raise NoEffect(
                    f"no optimizer can run {self.implementation}",
                    "; ".join(change.after for change in receipt.skipped)
                    or "`configure_optimizers` gave none",
                    "leave FusedOptimizer out",
                )
            if not context.is_copy:
                self._tell(receipt)
            yield receipt
        finally:
            held.release()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_of(trainer.strategy, "DeepSpeed"):
            raise Unsupported(
                "DeepSpeed builds its own optimizers",
                type(trainer.strategy).__name__,
                "name the optimizer in DeepSpeed's configuration",
            )
        super().on_fit_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in self._optimizers:  # strategies that load past `load_state_dict`
            use_implementation(optimizer, self.implementation)
        self._layout.renew()

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._layout.come_last()

    @override
    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Look at the layout of all state again, which followed the edit."""
        self._layout.renew()

    def _tell(self, receipt: Receipt) -> None:
        done = "; ".join(f"{change.name}: {change.what}" for change in receipt.changes)
        rank_zero_info(f"FusedOptimizer({self.implementation!r}): {done or 'nothing to change'}.")
        for change in receipt.skipped:
            rank_zero_info(f"{change.name} is left as it is. {change.after}")


class _Held:
    """Optimizers that run in another implementation, until `release`."""

    def __init__(self, implementation: str, layout: Layout) -> None:
        self.implementation = implementation
        self.originals: list[tuple[Optimizer, Original]] = []
        self._handles: list[RemovableHandle] = []
        self._layout = layout

    def take(self, context: Context, optimizer: Optimizer) -> Receipt:
        """Let an optimizer run so.

        Raises:
            NoEffect: It has no such implementation.
            Unsupported: A gradient will be sparse.
        """
        original = Original(optimizer)
        self._refuse_sparse(optimizer, sparse_weights(context.module))
        receipt = use_implementation(optimizer, self.implementation)
        self.originals.append((optimizer, original))
        trainer = context.trainer
        if getattr(trainer.precision_plugin, "scaler", None) is None or trainer.gradient_clip_val:
            # Built fused, it would unscale in its kernel, and Lightning then refuses to clip, also
            # without a scaler (Lightning #21435, can go with 2.7). So the scaler does that before.
            vars(optimizer).pop("_step_supports_amp_scaling", None)
        self._handles += [
            optimizer.register_load_state_dict_post_hook(self._apply),
            optimizer.register_state_dict_post_hook(lambda _, state: original.rewrite(state)),
        ]
        if self.implementation == "fused":
            self._layout.watch(optimizer)
        return receipt

    def release(self) -> None:
        """Let all run as they were built."""
        self._layout.release()
        for handle in self._handles:
            handle.remove()
        for optimizer, original in self.originals:
            original.put_back(optimizer)

    def _apply(self, optimizer: Optimizer) -> None:
        use_implementation(optimizer, self.implementation)
        self._layout.renew()

    def _refuse_sparse(self, optimizer: Optimizer, sparse: dict[torch.Tensor, str]) -> None:
        held = {p for group in optimizer.param_groups for p in group["params"]} if sparse else set()
        names = [name for weight, name in sparse.items() if weight in held]
        if names and self.implementation != "for-loop":
            raise Unsupported("a gradient will be sparse", names[0], "build it with sparse=False")
