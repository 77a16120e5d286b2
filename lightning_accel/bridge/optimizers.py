"""Which optimizers a fit really has, and which tensors are kept beside its parameters."""

from __future__ import annotations

import weakref
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn

from lightning_accel.errors import Unsupported
from lightning_accel.surgery.optimizers import Steps, parameters_of, within
from lightning_accel.surgery.shadows import Shadows

_WATCHED: weakref.WeakKeyDictionary[nn.Module, Steps] = weakref.WeakKeyDictionary()
_OF_THE_MODULE = ("_parameters", "_buffers", "_modules", "_trainer", "_fabric", "trainer")


def watch(pl_module: LightningModule) -> None:
    """Note from now on which optimizers step the module, wherever they are hidden."""
    unwatch(pl_module)
    known = weakref.ref(pl_module)
    _WATCHED[pl_module] = Steps(lambda: m.parameters() if (m := known()) is not None else ())


def unwatch(pl_module: LightningModule) -> None:
    """Stop that."""
    steps = _WATCHED.pop(pl_module, None)
    if steps is not None:
        steps.stop()


def optimizers_of(trainer: Trainer, pl_module: LightningModule) -> list[Any]:
    """Return those of the Trainer, those inside them or held by the module, and those seen at work."""
    steps = _WATCHED.get(pl_module)
    found = within(trainer.optimizers, pl_module, steps.seen() if steps is not None else ())
    mine = {id(p) for p in pl_module.parameters()}
    # Those of the Trainer may hold parameters that came from elsewhere, such as projectors.
    given = within(trainer.optimizers)
    return [o for o in found if o in given or any(id(p) in mine for p in parameters_of(o))]


def shadows_of(trainer: Trainer, pl_module: LightningModule) -> Shadows:
    """Return the tensors that callbacks, the module and optimizers keep beside its parameters."""
    optimizers = optimizers_of(trainer, pl_module)
    holders: dict[str, dict[str, Any]] = {}
    for number, optimizer in enumerate(optimizers):
        # `state` follows by `follow`.
        own = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
        holders[f"optimizer{number}"] = own
    for number, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        if not isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            ours = type(callback).__module__.startswith("lightning_accel.")
            holders |= {} if ours else _held_by(callback, f"{type(callback).__name__}{number}")
    for name, module in pl_module.named_modules():
        kept = {k: v for k, v in vars(module).items() if k not in _OF_THE_MODULE}
        holders[name or type(pl_module).__name__] = kept
    groups = [group["params"] for o in optimizers for group in o.param_groups]
    flat = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    return Shadows(pl_module, holders, [*groups, *flat])


def refuse_flat(shadows: Shadows) -> None:
    """Raise when someone keeps all weights in one vector, which no cut can follow."""
    if shadows.flat:
        raise Unsupported(
            "a vector of all weights cannot follow a prune",
            shadows.flat[0],
            "keep a dict by name instead, `{name: p.detach().clone() for name, p in ...}`",
        )


def _held_by(one: Any, where: str) -> dict[str, dict[str, Any]]:
    """Return what an object holds, and what objects that it holds do (an `Ema` of a callback)."""
    found = {where: dict(vars(one))}
    for key, value in vars(one).items():
        if hasattr(value, "__dict__") and not isinstance(
            value, (type, nn.Module, Trainer, LightningModule)
        ):
            found[f"{where}.{key}"] = dict(vars(value))
    return found
