"""A pruner of torch-pruning, made for a copy and run to where it is due.

Its pruner chooses and cuts on a twin, and `watch` reads off what it took. Nothing else of it is used: not its
parameters (all new, and none that the optimizer knows), nor its history (heads come out wrong when it is replayed),
nor its eval mode.

The user's function gets a copy of the whole model, with all of its parameters trainable, for what is frozen
torch-pruning cannot see; groups that touch what is frozen are left alone. `ignored_layers`, `num_heads` and the like
are found in that copy. Its example is a tuple of arguments, or a dict of keyword arguments.

Each epoch of `when` is one `step()` of the pruner, so its `iterative_steps` is their number, and its own scheduler says
how the share rises. With one epoch all of its steps are made there.

A pruner with a `regularize` trains sparsely up to the first prune: it adds to the gradients before each optimizer step,
after accumulation and unscaling, and before Lightning clips. `update_regularizer` is called when training starts, and
`update_reg` (of growing regularization) after each epoch.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_accel.errors import AccelError, Unsupported, explain
from lightning_accel.pruning.importance import require_gradients
from lightning_accel.pruning.interop import by_name, of_copy
from lightning_accel.pruning.removal_recorder import Failed, Removal, RemovalRecorder
from lightning_accel.surgery import Change, Select, Structure
from lightning_accel.surgery.call import Call

Pruner = Callable[[Any, Any], Any]
"""A function of a copy of the model, and of an example for it, that returns a pruner of torch-pruning."""

_OURS = "leave `pruner` out and pass `ratio=`: the tracer of this package follows more networks"


class Turn(NamedTuple):
    """Which of how many moments this is, counted from 1; and the sizes before the first one."""

    due: int = 1
    of: int = 1
    dense: Structure = Structure()


def check_pruner(pruner: Any) -> None:
    """Raise `TypeError` unless this is a function that could make a pruner.

    >>> check_pruner(lambda model, example: None)
    """
    what = (
        "`pruner` is a function of a model and an example, which returns a pruner of torch-pruning"
    )
    remedy = "pass lambda model, example: tp.pruner.BasePruner(model, example, importance=...)"
    if not callable(pruner) or isinstance(pruner, nn.Module) or hasattr(pruner, "DG"):
        raise TypeError(explain(what, repr(pruner), remedy))
    try:
        inspect.signature(pruner).bind(None, None)
    except TypeError as error:
        raise TypeError(explain(what, str(error), remedy)) from None
    except ValueError:  # a callable that shows no signature
        pass


_ALONE = {
    "select": (None, Select()),
    "importance": ("magnitude",),
    "scope": ("local",),
    "schedule": ("linear", "one_shot"),
    "round_to": (None,),
    "attention": ("heads",),
}
"""What may stand beside a pruner: the defaults, which say nothing."""


SAID_BY_PRUNER = tuple(_ALONE)


_SLOW_AFTER = 120.0  # seconds


@contextmanager
def _told_if_slow() -> Iterator[None]:
    """Warn, from beside, when torch-pruning may not come back (VainF/Torch-Pruning#454, #527)."""
    text = explain(
        "torch-pruning is still at work, and may never end",
        f"{_SLOW_AFTER:g} seconds in one call; grouped queries with rotary embeddings are known for it",
        f"wait, or interrupt: then add layers to `ignored_layers`, or {_OURS}",
    )
    timer = threading.Timer(_SLOW_AFTER, warnings.warn, (text,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def reads_gradients(made: Any) -> bool:
    """Whether the importance of a pruner reads the gradients of one backward (Taylor's)."""
    return any("Taylor" in base.__name__ for base in type(made.importance).__mro__)


def require_alone(settings: Mapping[str, Any]) -> None:
    """Raise `ValueError` if what a pruner says itself is said beside it as well.

    >>> require_alone({"scope": "local"})
    """
    odd = [name for name, value in settings.items() if value not in _ALONE[name]]
    if odd:
        raise ValueError(
            explain(
                f"`{odd[0]}` is said by the pruner of torch-pruning itself",
                f"{odd[0]}={settings[odd[0]]!r} beside `pruner`",
                "leave it out, and say it in the function: ignored_layers, importance, global_pruning, round_to",
            )
        )


def make_pruner(
    pruner: Pruner, model: nn.Module, calls: Sequence[Call], users: nn.Module | None = None
) -> Any:
    """Call the user's function on `model`, a twin, which it leaves in eval mode and all trainable.

    Raises:
        TypeError: It returns no pruner.
        AccelError: It fails.
    """
    for parameter in model.parameters():  # what is frozen, torch-pruning's tracing would not see
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    example = _answering(model, calls)
    with torch.enable_grad(), _told_if_slow():
        try:
            made = pruner(model, example)
        except Exception as error:  # whatever tracing, or the user's function, may raise
            first = (
                error.__context__ or error
            )  # a forward that failed is tried again in another way
            raise AccelError(
                "the pruner of torch-pruning cannot be made for this network",
                f"{type(first).__name__}: {first}",
                f"mend the function, or {_OURS}",
            ) from error
    if not hasattr(made, "step") or not hasattr(made, "DG"):
        raise TypeError(
            explain(
                "`pruner` returns a pruner of torch-pruning", repr(made), "return the pruner itself"
            )
        )
    if getattr(made, "current_step", 0):
        raise AccelError(
            "the pruner has made a step before it was returned",
            f"current_step={made.current_step}",
            "return it as it is made: its steps are made here, at the epochs of `when`",
        )
    if getattr(made, "model", model) not in list(model.modules()):
        raise AccelError(
            "`pruner` is called with a copy of the model, and pruned another one",
            type(made.model).__name__,
            "use the function's own argument, and find `ignored_layers` and all other modules in it",
        )
    _require_own(made, model)
    if users is not None and hasattr(made, "importance"):
        made.importance = of_copy(by_name(made.importance, users), model)
    return made


def _require_own(made: Any, model: nn.Module) -> None:
    """Raise if layers are named that are none of the copy's: torch-pruning would pass over them."""
    own = {id(part) for part in (*model.modules(), *model.parameters())}
    for argument in ("ignored_layers", "ignored_params", "pruning_ratio_dict", "num_heads"):
        for part in getattr(made, argument, ()):
            if id(part) not in own:
                raise AccelError(
                    f"`{argument}` names a layer that is not in the copy that the pruner is made for",
                    repr(part)[:80],
                    "find it in the function's own argument: model.net.head, not self.net.head",
                )


def release(made: Any, model: nn.Module) -> None:
    """Let go of a copy: where nothing else is given, all pruners share two dicts that hold its layers."""
    for argument in ("in_channel_groups", "out_channel_groups"):
        shared = getattr(made, argument, {})
        for module in model.modules():
            shared.pop(module, None)


def removals(
    pruner: Pruner,
    twins: Callable[[], nn.Module],
    calls: Sequence[Call],
    turn: Turn,
    users: nn.Module | None = None,
) -> tuple[list[Removal], list[Change]]:
    """Return what the pruner takes at this step, and the groups at which it failed.

    Args:
        pruner: The user's function.
        twins: Makes a copy of the model, with gradients where it has any.
        calls: Example calls.
        turn: Which of the pruner's steps are due.
        users: The user's network, for whose parameters an importance may have gathered something.

    Raises:
        AccelError: It fails as a whole.
        Unsupported: Its steps are others than ours.
    """
    failed: dict[str, str] = {}
    while True:
        model = twins()
        made = make_pruner(pruner, model, calls, users)
        if reads_gradients(made):
            require_gradients(model)
        try:
            watch = RemovalRecorder(model, made)
            with torch.no_grad(), _told_if_slow():
                for _ in _steps(made, turn, partial(_dense, pruner, twins, calls, turn.dense)):
                    for group in _groups(made):
                        watch.prune(group, failed)
        except Failed as error:
            if error.name in failed:
                raise AssertionError(f"a group that was left out failed: {error.name}") from error
            failed[error.name] = error.reason
            continue
        finally:
            release(made, model)
        return watch.found, [Change(name, reason) for name, reason in failed.items()]


def _steps(made: Any, turn: Turn, dense: Callable[[], Any]) -> Iterator[None]:
    """Yield once per step of the pruner that is due now."""
    number = int(getattr(made, "iterative_steps", 1))
    if turn.of == 1:
        yield from (None for _ in range(number))
        return
    if number != turn.of:
        raise Unsupported(
            "each epoch of `when` is one step of the pruner",
            f"iterative_steps={number}, and {turn.of} epochs in `when`",
            f"give the pruner iterative_steps={turn.of}, or prune at one epoch, where all its steps are made",
        )
    if turn.due > 1:
        before = dense()
        made._scope_initial_channels = dict(before._scope_initial_channels)
        made.initial_total_heads = before.initial_total_heads
        made.current_step = turn.due - 1
    yield None


def _dense(
    pruner: Pruner, twins: Callable[[], nn.Module], calls: Sequence[Call], dense: Structure
) -> Any:
    """Return the pruner for the sizes before the first step, so far that it has counted its channels.

    What share has gone already, torch-pruning knows from the numbers of its first step only.
    """
    model = twins()
    dense.apply(model)
    for parameter in model.parameters():  # an importance that reads gradients counts as well
        parameter.grad = torch.zeros_like(parameter)
    made = make_pruner(pruner, model, calls)
    if not hasattr(made, "_scope_initial_channels") or not hasattr(made, "initial_total_heads"):
        raise Unsupported(
            "this version of torch-pruning keeps other counts than those that are known here",
            f"{type(made).__name__} has no `_scope_initial_channels`",
            "prune at one epoch",
        )
    with torch.no_grad():
        for _ in _groups(made):
            pass
    release(made, model)
    return made


def _groups(made: Any) -> Iterator[Any]:
    try:
        yield from made.step(interactive=True) or ()
    except Failed:
        raise
    except Exception as error:  # whatever torch-pruning may raise
        raise AccelError(
            "the pruner of torch-pruning fails in its step",
            f"{type(error).__name__}: {error}",
            f"mend its arguments, or {_OURS}",
        ) from error


def _answering(model: nn.Module, calls: Sequence[Call]) -> Any:
    """Let a copy answer to what its networks receive, and return that as torch-pruning takes examples.

    A tuple of arguments, or a dict of keyword arguments: a tensor alone torch-pruning would take apart.
    """
    first = calls[0]
    if len(calls) > 1 or first.name or (first.args and first.kwargs):
        model.forward = partial(_run, model, model.forward, tuple(calls))
        return first.args or first.kwargs
    return first.kwargs or first.args


def _run(
    model: nn.Module, forward: Callable[..., Any], calls: Sequence[Call], *_: Any, **__: Any
) -> Any:
    outputs = [
        (model.get_submodule(c.name) if c.name else forward)(*c.args, **c.kwargs) for c in calls
    ]
    return outputs[0] if len(outputs) == 1 else outputs
