"""Steps of a run on copies of its module, before it is sharded: what they do with the weights, in all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _configure_optimizers
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_accel.bridge.data import batches, evaluation_batches
from lightning_accel.bridge.example import OfValidation, placed, run_placed, step_arguments
from lightning_accel.bridge.inert import Inert, inert_copy
from lightning_accel.errors import AccelError
from lightning_accel.parallel.meta import on_meta
from lightning_accel.parallel.uses import Uses, uses_of
from lightning_accel.surgery.acting import nothing_heard
from lightning_accel.surgery.preserve import preserve_rng

_COUNT = 2
"""Batches that are tried on each process; of a layer that is skipped by chance, some process sees it."""


def uses_of_fit(trainer: Trainer, pl_module: LightningModule) -> Uses | None:
    """Return what the steps of this run do with the weights, as all processes saw it; `None` where nothing can be tried.

    The steps run on a copy, one after another, on the device if two of the module fit there, else on the host. Neither
    the module nor its data, nor any random state, notices.
    """
    found, failed = Uses(), ""
    try:
        for step in steps_of(trainer, pl_module):
            with preserve_rng(), copy_on_device(trainer, pl_module) as copy:
                found.join(uses_of(copy, partial(step, copy)))
    except AccelError as error:  # data that are read once, or a step that cannot run on a copy
        failed = str(error)
    everywhere: list[Any] = [(found, failed)]
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (found, failed))
    if reasons := [failed for _, failed in everywhere if failed]:
        rank_zero_info(f"No step could be tried before sharding: {reasons[0]}")
        return None
    together = Uses()
    for one, _ in everywhere:
        together.join(one)
    return together if together.calls else None


@contextmanager
def copy_on_device(trainer: Trainer, pl_module: LightningModule) -> Iterator[LightningModule]:
    """Give a copy with its forward hooks, of which nobody outside hears."""
    with nothing_heard(pl_module), inert_copy(trainer, pl_module, hooked=True) as copy:
        copy.to(_roomy(pl_module, trainer.strategy.root_device))
        if trainer.state.fn == TrainerFn.FITTING and not copy.automatic_optimization:
            _steps_by_hand(trainer, copy)
        yield copy


def _steps_by_hand(trainer: Trainer, copy: Any) -> None:
    """Let a step of manual optimization run backward, and find as many optimizers as there will be."""
    vars(copy)["manual_backward"] = lambda loss, *args, **kwargs: loss.backward(*args, **kwargs)
    if not trainer.optimizers:
        with suppress(Exception):  # whatever a user's hook raises before its time
            optimizers = _configure_optimizers(copy.configure_optimizers())[0]
            inert = [_Stepping(optimizer) for optimizer in optimizers]
            vars(copy)["_its_optimizers"] = optimizers  # which an `Inert` does not keep alive
            vars(copy)["optimizers"] = lambda *_, **__: inert[0] if len(inert) == 1 else inert


class _Stepping(Inert):
    """Stands for an optimizer, whose step changes nothing but runs its closure."""

    def step(self, closure: Any = None, **_: Any) -> Any:
        return None if closure is None else closure()


def _roomy(pl_module: LightningModule, device: torch.device) -> torch.device:
    """Return a device on which a copy and the gathered weights have room; meta for what is there."""
    if on_meta(pl_module):
        return torch.device("meta")
    size = sum(p.numel() * p.element_size() for p in pl_module.parameters())
    fits = device.type != "cuda" or 2 * size < torch.cuda.mem_get_info(device)[0]
    return device if fits else torch.device("cpu")


def steps_of(
    trainer: Trainer, pl_module: LightningModule
) -> list[Callable[[LightningModule], Any]]:
    """Return functions of a copy, one for each step that this run will do."""
    if trainer.state.fn == TrainerFn.FITTING:
        trainer.fit_loop.setup_data()  # which the fit itself does next, and then finds done
        given: list[Any] = batches(trainer, _COUNT)
        if trainer.enable_validation:
            loop = trainer.fit_loop.epoch_loop.val_loop
            loop.setup_data()
            given += [OfValidation(*one) for one in evaluation_batches(trainer, loop, 1)]
        return [partial(_run, trainer, batch, index) for index, batch in enumerate(given)]
    loop, name = _evaluation(trainer)
    loop.setup_data()

    given = evaluation_batches(trainer, loop, _COUNT)
    return [partial(_evaluate, trainer, name, *one) for one in given]


def _run(trainer: Trainer, batch: Any, index: int, copy: LightningModule) -> Any:
    return run_placed(trainer, copy, there(trainer, copy, batch), index)


def _evaluate(trainer: Trainer, name: str, batch: Any, loader: int, copy: LightningModule) -> Any:
    with torch.no_grad():
        arguments = step_arguments(copy, there(trainer, copy, batch), 0, name, loader)
        return getattr(copy.eval(), name)(*arguments)


def there(trainer: Trainer, copy: LightningModule, batch: Any) -> Any:
    """Return a batch as the step gets it, where the copy is."""
    batch = placed(trainer, copy, batch)
    if isinstance(batch, OfValidation):
        return batch._replace(batch=move_data_to_device(batch.batch, copy.device))
    return move_data_to_device(batch, copy.device)


def _evaluation(trainer: Trainer) -> tuple[Any, str]:
    return {
        TrainerFn.VALIDATING: (trainer.validate_loop, "validation_step"),
        TrainerFn.TESTING: (trainer.test_loop, "test_step"),
        TrainerFn.PREDICTING: (trainer.predict_loop, "predict_step"),
    }[trainer.state.fn]  # type: ignore[index]
