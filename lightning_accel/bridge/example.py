"""What the networks inside a LightningModule really receive, with nothing asked of the user.

A LightningModule has no fixed input: only its own `training_step` knows how a batch becomes the
arguments of a network. So the step is run once, on a twin whose logging and optimizers do nothing,
with a batch of the user's own training data, and the outermost calls of trainable modules are noted:
positional and keyword arguments, any structure. Neither weights, metrics, optimizers, random state
nor the order of the data are touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy as shallow_copy
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torchmetrics import Metric

from lightning_accel.bridge.data import batches, validation_batches
from lightning_accel.bridge.inert import inert_copy
from lightning_accel.errors import AccelError
from lightning_accel.surgery.acting import nothing_heard, users_hooks
from lightning_accel.surgery.call import Call, as_call, run
from lightning_accel.surgery.preserve import preserve_rng, preserve_state

_STARTED = "_accel_started"
_MORE = 8
"""Batches of which those are taken that reach layers which the first one does not."""


class AtHand(NamedTuple):
    """A batch that the fit itself was given, in place and through all hooks."""

    batch: Any


class OfValidation(NamedTuple):
    """A batch for `validation_step`, and the number of its loader."""

    batch: Any
    loader: int = 0


class StepFailed(AccelError):
    """A step of the user's raised on a copy of the module; the error itself is the cause."""


def find_example(
    trainer: Trainer,
    pl_module: LightningModule,
    example: Any = None,
    at_hand: AtHand | None = None,
    *,
    reach: bool = False,
) -> tuple[Call, ...]:
    """Return example calls: the explicit ones, else `example_input_array`, else a real batch's.

    Args:
        trainer: A Trainer within a fit.
        pl_module: The user's module.
        example: Arguments of its `forward`: a tensor, a tuple of arguments, or a dict of keywords.
        at_hand: A batch of this fit, for data that can be read only once.
        reach: Where these calls do not reach all trainable layers of the networks that they call (one head per
            task, or one for training only), add those of more batches, of training and validation, that do.

    Raises:
        ReadOnce: The data can be read only once, and no batch is at hand.
        AccelError: No trainable module is called in `training_step`, or the step failed on the twin.
    """
    if example is None and is_overridden("forward", pl_module):
        example = pl_module.example_input_array
    ran: set[str] = set()
    if example is None:
        # To its end: it puts the random state back.
        (calls,) = calls_of(trainer, pl_module, batches_or(trainer, 1, at_hand), ran)
        return _reaching_more(trainer, pl_module, calls, ran, at_hand) if reach else calls
    device = pl_module.device
    example = tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, example)
    calls = (as_call(example, _entry(pl_module)),)
    if not reach:
        return calls
    with (
        preserve_rng(),
        inert_copy(trainer, pl_module) as copy,
        noting(copy.eval(), {}, ran),
        suppress(Exception),  # whatever a forward may raise: who uses the example says so
        torch.no_grad(),
    ):
        run(copy, calls)
    with suppress(AccelError):  # what was given will do
        found = _reaching_more(trainer, pl_module, calls, set(ran), at_hand)
        # Of other networks of the module nothing was said.
        calls += tuple(call for call in found[len(calls) :] if call.name in ran)
    return calls


def _reaching_more(
    trainer: Trainer,
    pl_module: LightningModule,
    calls: tuple[Call, ...],
    ran: set[str],
    at_hand: AtHand | None,
) -> tuple[Call, ...]:
    """Return the calls, and those of more batches that reach layers which these do not."""

    def more(data: list[Any]) -> None:
        nonlocal calls
        known = len(ran)
        for found in calls_of(trainer, pl_module, data, ran):
            if len(ran) > known:
                calls, known = (*calls, *found), len(ran)

    if _idle(pl_module, calls, ran):
        more(batches_or(trainer, _MORE, at_hand))
    if _idle(pl_module, calls, ran):
        with suppress(AccelError):  # of a validation that is read once, or fails on a copy
            more([OfValidation(*given) for given in validation_batches(trainer, _MORE)])
    return calls


def _idle(pl_module: LightningModule, calls: tuple[Call, ...], ran: set[str]) -> list[str]:
    """Return the trainable layers of the networks called that did not run, as far as hooks can tell."""
    return [
        name
        for called in dict.fromkeys(call.name for call in calls)
        for name, module in pl_module.get_submodule(called).named_modules(prefix=called)
        if name not in ran
        and isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
        and type(module) is not nn.modules.linear.NonDynamicallyQuantizableLinear
        and any(p.requires_grad for p in module.parameters(recurse=False))
    ]


def batches_of(trainer: Trainer, pl_module: LightningModule, count: int) -> list[tuple[Call, ...]]:
    """Return the calls that `count` training batches lead to; always the same ones for one dataset."""
    return list(calls_of(trainer, pl_module, batches(trainer, count)))


def batches_or(trainer: Trainer, count: int, at_hand: AtHand | None) -> list[Any]:
    """Return batches of the fit; the one at hand for data that can be read only once, or have been."""
    try:
        return batches(trainer, count)
    except AccelError:
        if at_hand is None:
            raise
        return [at_hand]


def calls_of(
    trainer: Trainer, pl_module: LightningModule, data: list[Any], ran: set[str] | None = None
) -> Iterator[tuple[Call, ...]]:
    """Yield the outermost calls of trainable modules for each batch; add to `ran` the modules that run."""
    with preserve_rng(), inert_copy(trainer, pl_module) as copy:
        for index, batch in enumerate(data):
            try:
                calls = outermost_calls(trainer, copy, placed(trainer, copy, batch), index, ran)
            except StepFailed:
                if not any(True for _ in users_hooks(pl_module)):
                    raise
                calls = _hooked_calls(trainer, pl_module, batch, index, ran)
            if not calls:
                raise AccelError(
                    "no trainable module is called in `training_step`",
                    f"{type(copy).__name__} calls none of its own modules",
                    "pass `example=` with the arguments of the LightningModule's forward",
                )
            yield calls


def _hooked_calls(
    trainer: Trainer, pl_module: LightningModule, batch: Any, index: int, ran: set[str] | None
) -> tuple[Call, ...]:
    """Return the calls of a step that fails without the hooks of the modules."""
    with nothing_heard(pl_module), inert_copy(trainer, pl_module, hooked=True) as copy:
        return outermost_calls(trainer, copy, placed(trainer, copy, batch), index, ran)


def outermost_calls(
    trainer: Trainer,
    copy: LightningModule,
    batch: Any,
    index: int,
    ran: set[str] | None = None,
) -> tuple[Call, ...]:
    """Return the outermost calls of trainable modules in one step of an inert copy."""
    calls: dict[str, Call] = {}
    with noting(copy, calls, set() if ran is None else ran):
        run_placed(trainer, copy, batch, index)
    return tuple(calls.values())


def run_step(trainer: Trainer, copy: LightningModule, batch: Any, index: int) -> Any:
    """Run a step of an inert copy on a batch, moved and cast as the Trainer would."""
    return run_placed(trainer, copy, placed(trainer, copy, batch), index)


def placed(trainer: Trainer, copy: LightningModule, batch: Any) -> Any:
    """Return a batch as the step gets it: cast, moved, and through the batch transfer hooks."""
    if isinstance(batch, AtHand):
        held, there = deepcopy(batch.batch), _device_of(trainer, copy)
        same = there.type == trainer.strategy.root_device.type
        return held if same else move_data_to_device(held, there)
    if isinstance(batch, OfValidation):
        return batch._replace(batch=placed(trainer, copy, batch.batch))
    batch = trainer.precision_plugin.convert_input(batch)
    batch = _hook(trainer, copy, "on_before_batch_transfer")(batch, 0)
    batch = _hook(trainer, copy, "transfer_batch_to_device")(batch, _device_of(trainer, copy), 0)
    return _hook(trainer, copy, "on_after_batch_transfer")(batch, 0)


def _device_of(trainer: Trainer, copy: LightningModule) -> torch.device:
    """Return where a step of the copy runs: at the end of a fit Lightning has moved its module to the CPU."""
    root = trainer.strategy.root_device
    kinds = {p.device.type: p.device for p in copy.parameters() if p.device.type != "meta"}
    return root if not kinds or root.type in kinds else next(iter(kinds.values()))


def run_placed(trainer: Trainer, copy: LightningModule, batch: Any, index: int) -> Any:
    """Run `training_step` of an inert copy, or `validation_step`, on a batch that is in place already.

    A step that fails is tried once more after the module's own hooks at the start of training, of an epoch
    and of a batch, in which many modules make what their steps use.
    """
    validates = isinstance(batch, OfValidation)
    name, kind = ("validation_step", "validation") if validates else ("training_step", "train")
    step = partial(_validation_step if validates else _step, trainer, copy, batch, index)
    try:
        try:
            return step()
        except Exception:
            if vars(copy).get(_STARTED) == kind:
                raise
            vars(copy)[_STARTED] = kind
            getattr(copy, f"on_{kind}_start")()
            getattr(copy, f"on_{kind}_epoch_start")()
            if validates:
                copy.on_validation_batch_start(batch.batch, index, batch.loader)
            else:
                copy.on_train_batch_start(batch, index)
            return step()
    except Exception as error:
        raise StepFailed(
            f"`{name}` failed on a copy of the module",
            f"{type(error).__name__}: {error}",
            "pass `example=` with the arguments of the LightningModule's forward",
        ) from error


def _step(trainer: Trainer, copy: LightningModule, batch: Any, index: int) -> Any:
    with torch.enable_grad(), trainer.precision_plugin.train_step_context():
        return copy.training_step(*step_arguments(copy, batch, index))


def _validation_step(
    trainer: Trainer, copy: LightningModule, given: OfValidation, index: int
) -> Any:
    copy.eval()
    with torch.no_grad(), trainer.precision_plugin.val_step_context():
        arguments = step_arguments(copy, given.batch, index, "validation_step", given.loader)
        return copy.validation_step(*arguments)


def _hook(trainer: Trainer, copy: LightningModule, name: str) -> Any:
    """Return a batch hook: that of the copy, or of the datamodule where Lightning takes that one."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if datamodule is None or not is_overridden(name, datamodule):
        return getattr(copy, name)
    stand_in = shallow_copy(datamodule)
    stand_in.trainer = vars(copy)["_trainer"]  # which looks on, as the copy does

    def hook(*args: Any) -> Any:
        with preserve_state(stand_in):
            return getattr(stand_in, name)(*args)

    return hook


def step_arguments(
    copy: LightningModule, batch: Any, index: int, name: str = "training_step", loader: int = 0
) -> tuple[Any, ...]:
    """Return what a step takes: the batch, perhaps its index, perhaps that of the loader."""
    names = list(inspect.signature(getattr(copy, name)).parameters)
    return (batch, index, loader)[: max(1, min(len(names), 3))] if names else ()


@contextmanager
def noting(copy: LightningModule, calls: dict[str, Call], ran: set[str]) -> Iterator[None]:
    """Note within the first outermost call of each trainable module of a copy, and which modules run."""
    depth = 0

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal depth
            ran.add(name)
            if depth == 0 and name not in calls and not _is_transformed(args, kwargs):
                calls[name] = Call(name, *tree_map(_frozen, (args, kwargs)))
            depth += 1

        return hook

    def leave(*_: Any) -> None:
        nonlocal depth
        depth -= 1

    handles = []
    for name, module in copy.named_modules():
        if not isinstance(module, Metric) and any(p.requires_grad for p in module.parameters()):
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_transformed(*given: Any) -> bool:
    """Whether a call is one of many that `torch.func` makes at once; none of them stands for itself."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any(isinstance(t, Tensor) and wrapped(t) for t in tree_leaves(given))


def _entry(pl_module: LightningModule) -> str:
    if is_overridden("forward", pl_module):
        return ""
    trainable = [
        n for n, m in pl_module.named_children() if any(p.requires_grad for p in m.parameters())
    ]
    if len(trainable) == 1:
        return trainable[0]
    raise AccelError(
        "an example needs a forward to go into",
        f"{type(pl_module).__name__} has no `forward` and {len(trainable)} trainable children",
        "leave `example` out, so that it is taken from a real batch, or define `forward`",
    )


def _frozen(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
