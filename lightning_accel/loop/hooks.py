"""What it costs to call hooks that do nothing, and to write down which hook runs.

A Trainer of Lightning 2.6 calls six hooks of each callback per step, also those that the callback does not
have, which costs about eight microseconds per callback. And it writes the name of the running hook into the
LightningModule some 44 times per step, each time through the checks of `nn.Module.__setattr__`.

Both can only be changed for the process: in Lightning's module of calls and in the class LightningModule.
So both are counted patches, taken back by the last user, that leave every other Trainer as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_HOOK = "_current_fx_name"
_CALL = "_call_callback_hooks"
_shortcuts: dict[type, int] = {}
"""Classes with a short way for `_HOOK`, and by how many users it was asked for."""
_dispatchers: dict[int, Any] = {}
"""By the id of its Trainer, what calls the hooks of callbacks."""


class Dispatch:
    """Calls the hooks of one Trainer's callbacks: those that a class or an instance really has.

    Args:
        trainer: Whose callbacks.
        empty: The class whose own hooks do nothing: Lightning's `Callback`.
    """

    def __init__(self, trainer: Any, empty: type) -> None:
        self._trainer = trainer
        self._empty = empty
        self._all: tuple[Any, ...] = ()
        self._having: dict[str, tuple[bool, ...]] = {}

    def __call__(self, hook: str, *args: Any, **kwargs: Any) -> None:
        """Call a hook on each callback that has it, in order."""
        trainer = self._trainer
        if tuple(trainer.callbacks) != self._all:
            self._all, self._having = tuple(trainer.callbacks), {}
        having = self._having.get(hook)
        if having is None:
            own = getattr(self._empty, hook)
            having = tuple(getattr(type(callback), hook) is not own for callback in self._all)
            self._having[hook] = having
        module = trainer.lightning_module
        if module:
            before = getattr(module, _HOOK)
            setattr(module, _HOOK, hook)
        for callback, has in zip(self._all, having, strict=True):
            if has or hook in callback.__dict__:
                getattr(callback, hook)(trainer, trainer.lightning_module, *args, **kwargs)
        if module:
            setattr(module, _HOOK, before)


@contextmanager
def only_real_hooks(calls: Any, trainer: Any, empty: type) -> Iterator[None]:
    """Let one Trainer call no empty hooks.

    Args:
        calls: Lightning's module `trainer.call`.
        trainer: The Trainer; others in the process call theirs as before.
        empty: Lightning's `Callback`.
    """
    stock = getattr(calls, _CALL)
    if not hasattr(stock, "accel_stock"):
        setattr(calls, _CALL, _choosing(stock, calls.log, empty))
    _dispatchers[id(trainer)] = Dispatch(trainer, empty)
    try:
        yield
    finally:
        _dispatchers.pop(id(trainer), None)
        ours = getattr(calls, _CALL)
        if not _dispatchers and hasattr(ours, "accel_stock"):
            setattr(calls, _CALL, ours.accel_stock)


def _choosing(stock: Any, log: logging.Logger, empty: type) -> Any:
    def call(trainer: Any, hook_name: str, *args: Any, **kwargs: Any) -> None:
        dispatch = _dispatchers.get(id(trainer))
        watched = type(trainer.profiler).__name__ != "PassThroughProfiler"
        special = "monitoring_callbacks" in kwargs or not hasattr(empty, hook_name)
        if dispatch is None or watched or special or log.isEnabledFor(logging.DEBUG):
            stock(trainer, hook_name, *args, **kwargs)
        else:
            dispatch(hook_name, *args, **kwargs)

    call.accel_stock = stock  # type: ignore[attr-defined]
    return call


class SignatureOnce:
    """Stands in for a training loop's `_build_kwargs`, which inspects `training_step` on every batch."""

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._stock = loop._build_kwargs
        self._known: tuple[Any, tuple[str, ...]] | None = None

    def __call__(self, kwargs: Any, batch: Any, batch_idx: int) -> Any:
        step = self._loop.trainer.lightning_module.training_step
        function = getattr(step, "__func__", step)
        if self._known is None or self._known[0] is not function:
            kwargs = self._stock(kwargs, batch, batch_idx)
            self._known = function, tuple(kwargs)
            return kwargs
        for name in self._known[1]:
            kwargs[name] = batch if name == "batch" else batch_idx
        return kwargs


@contextmanager
def short_hook_name(kind: type) -> Iterator[None]:
    """Let instances of a module class take the name of the running hook without `nn.Module`'s checks.

    Args:
        kind: `LightningModule`. Several users at once share one patch; the last one takes it back.
    """
    _shortcuts[kind] = _shortcuts.get(kind, 0) + 1
    if _shortcuts[kind] == 1 and "__setattr__" not in vars(kind):
        kind.__setattr__ = _set  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        _shortcuts[kind] -= 1
        if not _shortcuts[kind]:
            del _shortcuts[kind]
            if vars(kind).get("__setattr__") is _set:
                del kind.__setattr__


def _set(self: nn.Module, name: str, value: Any) -> None:
    if name == _HOOK:
        self.__dict__[name] = value
    else:
        nn.Module.__setattr__(self, name, value)
