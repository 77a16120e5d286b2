"""What a run and its module add to a plan: the steps that are tried, and copies of parts that follow them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.bridge.example import OfValidation, noting
from lightning_accel.bridge.parts import Part, widened
from lightning_accel.errors import AccelError
from lightning_accel.parallel.tensor.plan import SplitGroup, TensorPlan
from lightning_accel.parallel.tensor.proof import Step
from lightning_accel.parallel.trial_steps import copy_on_device, steps_of, there
from lightning_accel.surgery.call import Call, run
from lightning_accel.surgery.preserve import preserve_rng


def copies(
    trainer: Trainer, root: LightningModule
) -> Callable[[bool], AbstractContextManager[nn.Module]]:
    """Return what gives an inert copy on the device, with the hooks of its modules; in full precision if asked for.

    In bfloat16 rounding is as large as many a fault.
    """

    def copy(full: bool) -> AbstractContextManager[nn.Module]:
        return (_full_copy if full else copy_on_device)(trainer, root)

    return copy


@contextmanager
def _full_copy(trainer: Trainer, root: LightningModule) -> Iterator[nn.Module]:
    plugin, enable, default = (
        trainer.precision_plugin,
        torch.set_autocast_enabled,
        torch.get_default_dtype(),
    )
    own = dict(vars(plugin))
    is_short = any(p.dtype in _SHORT for p in root.parameters())
    torch.set_autocast_enabled = _rests(enable)
    if is_short:  # its steps would make short tensors, and be given some
        torch.set_default_dtype(torch.float32)
        vars(plugin).update(forward_context=nullcontext, convert_input=full)
    try:
        with copy_on_device(trainer, root) as copy:
            yield copy.float() if is_short else copy
    finally:
        torch.set_autocast_enabled = enable
        torch.set_default_dtype(default)
        vars(plugin).clear()
        vars(plugin).update(own)


_SHORT = (torch.bfloat16, torch.float16)


def _rests(enable: Any) -> Any:
    """Return what turns autocast off where it was to be turned on or off."""

    def run(*args: Any) -> None:
        enable(*(False if isinstance(value, bool) else value for value in args))

    return run


def full(data: Any) -> Any:
    """Return data with float32 in place of shorter formats."""
    return tree_map(lambda v: v.float() if isinstance(v, Tensor) and v.dtype in _SHORT else v, data)


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
    """Return what is compared: the steps of this run, one after another, with backward and logged values; and outputs."""
    training, others = _sorted(trainer, root)
    fit = [partial(_learned, training, {})] if training else []
    return [*fit, *(partial(_logged, step) for step in others), partial(_outputs, calls)]


def hooked_steps_of_run(trainer: Trainer, root: LightningModule) -> list[Step]:
    """Return the same training steps with the hooks of the module that may look at weights and gradients, if it has any."""
    hooks = {name: True for name in (*_BEFORE, *_AFTER) if is_overridden(name, root)}
    training, _ = _sorted(trainer, root)
    return [partial(_learned, training, hooks)] if training and hooks else []


_BEFORE = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")
_AFTER = (
    "backward", "on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step",
    "on_before_zero_grad", "on_train_batch_end", "on_train_epoch_end", "on_validation_epoch_end",
)  # fmt: skip
"""In the order in which a fit calls them."""


def _sorted(trainer: Trainer, root: LightningModule) -> tuple[list[Any], list[Any]]:
    """Return the steps that train, and those that do not."""
    if trainer.state.fn != TrainerFn.FITTING:
        return [], list(steps_of(trainer, root))
    steps: list[Any] = steps_of(trainer, root)
    training = [step for step in steps if not isinstance(step.args[1], OfValidation)]
    return training, [step for step in steps if step not in training]


def _learned(steps: list[Any], hooks: dict[str, bool], copy: Any) -> Any:
    """Run training steps on a copy, each with its backward pass, and return what they return and log.

    Args:
        steps: Each a `partial` of the Trainer, a batch and its index.
        hooks: By name whether a hook runs on a copy; those that do not are left out from then on.
        copy: Inert; `_sum_partial` of it adds parts of gradients.
    """
    logged, outputs = _logging(copy), []
    optimizer = torch.optim.SGD(copy.parameters(), 0.0)

    def call(name: str, *args: Any) -> None:
        if hooks.get(name):
            try:
                getattr(copy, name)(*args)
            except Exception:  # of a hook that wants what only a fit has
                if vars(copy).get("_is_split"):
                    raise
                hooks[name] = False

    for name in _BEFORE[:-1]:
        call(name)
    for step in steps:
        trainer, batch, index = step.args
        given = there(trainer, copy, batch) if hooks else None
        call("on_train_batch_start", given, index)
        output = step(copy)
        loss = output.get("loss") if isinstance(output, dict) else output
        if copy.automatic_optimization and isinstance(loss, Tensor) and loss.requires_grad:
            call("backward", loss) if hooks.get("backward") else loss.backward()
        vars(copy).get("_sum_partial", _nothing)()
        call("on_after_backward")
        call("on_before_optimizer_step", optimizer)
        call("configure_gradient_clipping", optimizer, None, None)
        call("optimizer_step", 0, index, optimizer, partial(_same, loss))
        call("on_before_zero_grad", optimizer)
        call("on_train_batch_end", output, given, index)
        outputs.append(output)
    for name in _AFTER[-2:]:
        call(name)
    return outputs, logged


def _nothing() -> None: ...


def _same(value: Any) -> Any:
    return value


def _logging(copy: Any) -> list[Any]:
    """Return the list to which a copy logs from now on."""
    logged: list[Any] = []
    vars(copy)["log"] = lambda name, value, *_, **__: logged.append(value)
    vars(copy)["log_dict"] = lambda values, *_, **__: logged.append(dict(values))
    return logged


def _logged(step: Step, copy: Any) -> Any:
    logged = _logging(copy)
    return step(copy), logged


def _outputs(calls: tuple[Call, ...], copy: nn.Module) -> Any:
    with torch.no_grad():
        return run(copy.eval(), [Call(c.name, *full((c.args, c.kwargs))) for c in calls])


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
