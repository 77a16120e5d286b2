"""What a run and its module add to a plan: the steps that are tried, and copies of parts that follow them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from lightning_accel.bridge.example import noting
from lightning_accel.bridge.parts import Part, widened
from lightning_accel.errors import AccelError
from lightning_accel.parallel.tensor.plan import SplitGroup, TensorPlan
from lightning_accel.parallel.tensor.proof import Step
from lightning_accel.parallel.trial_steps import copy_on_device, steps_of
from lightning_accel.surgery.call import Call, run
from lightning_accel.surgery.preserve import preserve_rng


def copies(
    trainer: Trainer, root: LightningModule
) -> Callable[[], AbstractContextManager[nn.Module]]:
    """Return what gives an inert copy on the device, with the hooks of its modules."""
    return partial(copy_on_device, trainer, root)


def calls_of_run(trainer: Trainer, root: LightningModule) -> tuple[Call, ...]:
    """Return the outermost calls of the module's networks in the steps of this run.

    Raises:
        AccelError: No step can be tried, or none calls a network.
    """
    calls: dict[str, Call] = {}
    for step in steps_of(trainer, root):
        with preserve_rng(), copy_on_device(trainer, root) as copy, noting(copy, calls, set()):
            step(copy)
    if not calls:
        raise AccelError(
            "no trainable module is called in the steps of this run",
            f"{type(root).__name__} calls none of its own modules",
            "use `accel_fsdp` or `accel_ddp`, which need to know no calls",
        )
    return tuple(calls.values())


def steps_of_run(trainer: Trainer, root: LightningModule, calls: tuple[Call, ...]) -> list[Step]:
    """Return what is compared: the steps of this run with their backward passes and logged values, and outputs."""
    fits = trainer.state.fn == TrainerFn.FITTING
    steps: list[Step] = [partial(_learned, step, fits) for step in steps_of(trainer, root)]
    return [*steps, partial(_outputs, calls)]


def _learned(step: Step, fits: bool, copy: Any) -> Any:
    logged: list[Any] = []
    vars(copy)["log"] = lambda name, value, *_, **__: logged.append(value)
    vars(copy)["log_dict"] = lambda values, *_, **__: logged.append(dict(values))
    output = step(copy)
    loss = output.get("loss") if isinstance(output, dict) else output
    if fits and copy.automatic_optimization and isinstance(loss, Tensor) and loss.requires_grad:
        loss.backward()
    return output, logged


def _outputs(calls: tuple[Call, ...], copy: nn.Module) -> Any:
    with torch.no_grad():
        return run(copy.eval(), calls)


def with_copies(plan: TensorPlan, copies: Sequence[Part]) -> TensorPlan:
    """Return a plan that splits copies of parts of the module as the parts: targets that follow (BYOL)."""
    inside = [c for c in copies if c.at and not any(_is_under(g, c.at) for g in plan.groups)]
    groups = list(plan.groups)
    for copy in inside:
        for group in plan.groups:
            if _is_under(group, copy.of):
                moved = partial(_moved, of=copy.of, to=copy.at or "")
                makers, readers = tuple(map(moved, group.makers)), tuple(map(moved, group.readers))
                groups.append(
                    SplitGroup(moved(group.name), group.kind, group.units, makers, readers)
                )
    cuts = tuple(widened(cut, inside) for cut in plan.cuts)
    return replace(plan, groups=tuple(groups), cuts=cuts)


def _is_under(group: SplitGroup, place: str) -> bool:
    return all(name.startswith(f"{place}.") for name in (*group.makers, *group.readers))


def _moved(name: str, of: str, to: str) -> str:
    return to + name.removeprefix(of)
