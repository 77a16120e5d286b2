"""What a fit trains, as a plan takes it: a copy of its module without numbers, a batch of its data, its optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, unset_fake_temporarily
from torch.optim import Optimizer

from lightning_accel.bridge.data import batches
from lightning_accel.bridge.example import placed, step_arguments
from lightning_accel.bridge.inert import inert_copy
from lightning_accel.errors import AccelError
from lightning_accel.parallel.planning import Workload
from lightning_accel.surgery.acting import nothing_heard
from lightning_accel.surgery.preserve import preserve_rng

_MIXED = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@contextmanager
def workload_of(trainer: Trainer, pl_module: LightningModule) -> Iterator[Workload]:
    """Give what this fit trains, once it is set up, with its data, and before anything of it is on a device.

    Raises:
        AccelError: Its data can be read only once, or it has other than one optimizer.
    """
    if not pl_module.automatic_optimization:
        raise AccelError(
            "memory is planned of automatic optimization",
            "manual optimization",
            "name the strategy: strategy='accel_ddp' or 'accel_fsdp'",
        )
    with preserve_rng(), nothing_heard(pl_module):
        batch = placed(trainer, pl_module, batches(trainer, 1)[0])
        count = len(step_arguments(pl_module, batch, 0))
        precision: Any = getattr(trainer.precision_plugin, "precision", None)
        yield Workload(
            make=lambda: _fake(trainer, pl_module),
            batch=lambda: apply_to_collection(batch, Tensor, _like),
            step=lambda model, given: _loss(model, (given, 0)[:count]),
            optimizer=partial(
                only_optimizer, do="name the strategy: strategy='accel_ddp' or 'accel_fsdp'"
            ),
            precision=_MIXED.get(precision),
        )


def _fake(trainer: Trainer, pl_module: LightningModule) -> nn.Module:
    """Return a copy whose tensors have sizes only, as the precision of the run wants them."""
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    with unset_fake_temporarily():
        if mode is None:  # where a split is planned
            with inert_copy(trainer, pl_module, hooked=True) as copy:
                return copy.to("meta")
        with FakeCopyMode(mode), inert_copy(trainer, pl_module, hooked=True) as copy:
            pass
    with mode:
        return trainer.precision_plugin.convert_module(copy)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)


def _loss(model: Any, arguments: tuple[Any, ...]) -> Tensor:
    output = model.training_step(*arguments)
    return output["loss"] if isinstance(output, dict) else output


def only_optimizer(model: Any, *, do: str) -> Optimizer:
    """Return the optimizer that a module makes.

    Raises:
        AccelError: It makes several, or none; with what to do about it.
    """
    found = _configure_optimizers(model.configure_optimizers())[0]
    if len(found) != 1:
        raise AccelError("memory is planned with one optimizer", f"{len(found)} optimizers", do)
    return found[0]
