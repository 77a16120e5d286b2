"""What runs on copies of the user's module, so that its hooks, logs and optimizers notice nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import find_shared_parameters, set_shared_parameters
from torch import Tensor, nn

from lightning_accel.bridge.example import AtHand, batches_or, calls_of, run_step
from lightning_accel.bridge.inert import inert_copy
from lightning_accel.bridge.restore import averages
from lightning_accel.errors import AccelError
from lightning_accel.exact import widest
from lightning_accel.surgery import twin
from lightning_accel.surgery.acting import nothing_heard, users_hooks
from lightning_accel.surgery.call import Call
from lightning_accel.surgery.preserve import preserve_rng


class TrainingData:
    """Up to `count` batches of a fit's training data, seen through copies of the module.

    Args:
        trainer: Of the fit.
        pl_module: The user's module.
        count: How many batches.
        at_hand: A batch of this fit, for data that can be read only once.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        count: int,
        at_hand: AtHand | None = None,
    ) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._count = count
        self._at_hand = at_hand

    def calls(self) -> Iterator[tuple[Call, ...]]:
        """Yield the calls of the module's networks for each batch."""
        return calls_of(
            self._trainer, self._module, batches_or(self._trainer, self._count, self._at_hand)
        )

    def copy(self) -> LightningModule:
        """Return a copy on which `training_step` has no effect outside it, with the hooks that take part."""
        hooked = any(True for _ in users_hooks(self._module))
        calls = next(self.calls()) if hooked else ()
        with inert_copy(self._trainer, self._module, calls) as copy:
            return copy

    def losses(self, copy: LightningModule) -> Iterator[Tensor]:
        """Yield the loss of each batch on a copy, one graph at a time."""
        for index, batch in enumerate(batches_or(self._trainer, self._count, self._at_hand)):
            output = run_step(self._trainer, copy, batch, index)
            loss = output["loss"] if isinstance(output, dict) else output
            if not isinstance(loss, Tensor):
                raise AccelError(
                    "this importance needs the loss that `training_step` returns",
                    type(output).__name__,
                    "return the loss, or use importance='magnitude'",
                )
            yield loss

    def with_gradients(self) -> LightningModule:
        """Return a copy whose parameters hold the summed gradients of the batches."""
        copy = self.copy()
        copy.zero_grad()
        for loss in self.losses(copy):
            loss.backward()
        return copy


@torch.no_grad()
def renew_buffers(
    trainer: Trainer, pl_module: LightningModule, work: Callable[[nn.Module], dict[str, Tensor]]
) -> None:
    """Let `work` find new buffers on a copy, and take over those that it names; in weight averages as well."""
    for model in (pl_module, *averages(trainer.callbacks, pl_module)):  # type: ignore[attr-defined]
        # A true precision converts the module only; hooks are part of what a norm sees.
        copy = _in_dtypes_of(pl_module, twin(model, hooked=True))
        with (
            preserve_rng(),
            nothing_heard(model),
            trainer.precision_plugin.train_step_context(),
        ):
            found = work(copy)
        for name, buffer in model.named_buffers():
            if name in found:
                buffer.copy_(found[name])


def _in_dtypes_of(module: nn.Module, copy: nn.Module) -> nn.Module:
    for tensors, likes in (
        (copy.named_parameters(), module.named_parameters()),
        (copy.named_buffers(), module.named_buffers()),
    ):
        dtypes = {name: like.dtype for name, like in likes}
        for name, tensor in tensors:
            tensor.data = tensor.data.to(dtypes.get(name, tensor.dtype))
    return copy


@contextmanager
def on_host(trainer: Trainer, pl_module: LightningModule) -> Iterator[LightningModule]:
    """Give the module to plan on: a copy on the CPU where a device has no float64, and on XLA.

    Proofs need float64, and lazy operators cannot be followed one by one.
    """
    device = trainer.strategy.root_device
    if device.type != "xla" and widest(device) == torch.float64:
        yield pl_module
        return
    with inert_copy(trainer, pl_module, hooked=True) as copy:
        ties = find_shared_parameters(copy)  # `Module.to` makes parameters anew, each by itself
        copy.to("cpu")
        set_shared_parameters(copy, ties)
        yield copy


def is_free(pl_module: LightningModule) -> bool:
    """Whether no parameter is frozen."""
    return all(p.requires_grad for p in pl_module.parameters())


def unfrozen(pl_module: LightningModule) -> LightningModule:
    """Return a copy that may be pruned anywhere: what is frozen now need not be when a prune is due."""
    if is_free(pl_module):
        return pl_module
    copy = twin(pl_module, hooked=True)
    for parameter in copy.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return copy
