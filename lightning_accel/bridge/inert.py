"""A copy of the user's module on which anything can be run, and nothing outside of it notices.

Logging, optimizers, schedulers and the Trainer are stand-ins: they can be read as the real ones, and every
use is accepted and does nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy as shallow_copy
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import PassThroughProfiler
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_accel.errors import Unsupported
from lightning_accel.surgery import twin
from lightning_accel.surgery.acting import attendants
from lightning_accel.surgery.call import Call

_SILENT = (
    "log",
    "log_dict",
    "print",
    "manual_backward",
    "toggle_optimizer",
    "untoggle_optimizer",
    "clip_gradients",
)
_METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


@contextmanager
def inert_copy(
    trainer: Trainer,
    pl_module: LightningModule,
    calls: Sequence[Call] = (),
    *,
    hooked: bool = False,
) -> Iterator[LightningModule]:
    """Give a twin on which `training_step` can run without any effect outside it.

    Args:
        trainer: Of the fit.
        pl_module: The user's module.
        calls: With these, the hooks that take part in the forward stay.
        hooked: All forward hooks stay.
    """
    copy = twin(pl_module, calls, hooked=hooked)
    if vars(copy).get("training_step", copy) is vars(pl_module).get("training_step"):
        del vars(copy)["training_step"]  # a function that is bound to the original
    look_on(trainer, copy)
    optimizers = [Inert(optimizer) for optimizer in trainer.optimizers] or [Inert()]
    schedulers = [Inert(config.scheduler) for config in trainer.lr_scheduler_configs]
    vars(copy)["optimizers"] = lambda *_, **__: (
        optimizers[0] if len(optimizers) == 1 else optimizers
    )
    if not trainer.optimizers:  # they are not made yet, and so neither are the schedulers
        schedulers = schedulers or [Inert()]
    vars(copy)["lr_schedulers"] = lambda *_, **__: _one_or_all(schedulers)
    with _hands_off(vars(trainer).get("_real", trainer).lightning_module, pl_module):
        yield copy


def look_on(trainer: Any, copy: nn.Module) -> None:
    """Let the modules of a copy read the Trainer, and log nothing."""
    inert = Inert()
    for module in copy.modules():
        if isinstance(module, LightningModule):
            vars(module).update(dict.fromkeys(_SILENT, inert))
            vars(module)["_trainer"] = Onlooker(trainer, copy)


def _attend(model: nn.Module, copy: nn.Module, hooked: bool) -> None:
    """Let a copy that is only tried read the Trainer, which Lightning leaves out of copies."""
    trainer = vars(model).get("_trainer") if isinstance(model, LightningModule) else None
    if trainer is not None and (hooked or type(trainer) is Onlooker):
        look_on(trainer, copy)


attendants.append(_attend)


@contextmanager
def _hands_off(*modules: LightningModule | None) -> Iterator[None]:
    """Refuse steps of optimizers on the user's parameters: a closure leads from a copy to the original's."""
    theirs = {id(p) for module in modules if module is not None for p in module.parameters()}

    def refuse(optimizer: Optimizer, *_: Any) -> None:
        if any(id(p) in theirs for group in optimizer.param_groups for p in group["params"]):
            raise Unsupported(
                "a step that is tried on a copy of the module would train the module itself",
                f"{type(optimizer).__name__} on its parameters, out of a closure",
                "keep the optimizer as an attribute, or step what `self.optimizers()` returns",
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


class Inert:
    """Stands for an optimizer, a scheduler or a logger: can be read, and every call does nothing.

    Args:
        real: What it stands for; its plain values are copies. It is not kept alive, and so not
            counted as held by one who may keep state beside it.

    >>> stand_in = Inert(None)
    >>> stand_in.anything.at_all(1) is None, stand_in.param_groups[0]["lr"]
    (True, 0.0)
    """

    def __init__(self, real: Any = None) -> None:
        try:
            self._named: Callable[[], Any] = weakref.ref(real)
        except TypeError:  # without a place for weak references, as `None` and classes with slots
            self._named = lambda: real

    @property
    def _real(self) -> Any:
        return self._named()

    def __call__(self, *_: Any, **__: Any) -> None:
        return None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Copies of the settings of each group, without parameters."""
        groups = getattr(self._real, "param_groups", None) or [{"lr": 0.0}]
        return [{**group, "params": []} for group in groups]

    def get_last_lr(self) -> list[Any]:
        """Return the learning rates of the scheduler that it stands for."""
        rates = getattr(self._real, "_last_lr", None)
        return list(rates) if rates is not None else [group["lr"] for group in self.param_groups]

    def toggle_model(self, *_: Any, **__: Any) -> Inert:
        """Return what can be entered and left, as an optimizer does."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._real, name, None)
        if isinstance(value, (bool, int, float, str)):
            return value
        return Inert(value if name == "optimizer" else None)

    def __enter__(self) -> Inert:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class Onlooker:
    """The Trainer as a rehearsal sees it: everything can be read; what is set, logged or saved stays here.

    Args:
        trainer: Of the fit.
        module: The copy that is rehearsed.
    """

    def __init__(self, trainer: Trainer, module: nn.Module) -> None:
        real: Any = vars(trainer).get("_real", trainer)
        inert = Inert()
        own = {
            "_real": real,
            "lightning_module": module,
            "model": module,
            "logger": inert if real.loggers else None,
            "loggers": [inert for _ in real.loggers],
            "optimizers": [Inert(optimizer) for optimizer in real.optimizers] or [Inert()],
            "save_checkpoint": inert,
            "profiler": PassThroughProfiler(),
            "datamodule": shallow_copy(real.datamodule),
        }
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self)["_real"], name)
        return dict(value) if name in _METRICS else value

    def __deepcopy__(self, memo: dict[int, Any]) -> Onlooker:
        return self

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # Lightning and users ask what it is
        return Trainer


def _one_or_all(schedulers: list[Inert]) -> Any:
    if len(schedulers) > 1:
        return schedulers
    return schedulers[0] if schedulers else None
