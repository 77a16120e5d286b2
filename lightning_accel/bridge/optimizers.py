"""Which optimizers a fit really has, and which tensors are kept beside its parameters."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from lightning_accel.errors import Unsupported
from lightning_accel.surgery.dropped import DroppedEntry, entries_of
from lightning_accel.surgery.optimizers import Steps, is_optimizer, parameters_of, within
from lightning_accel.surgery.owners import kept_by, owners
from lightning_accel.surgery.shadows import Shadows

_WATCHED: weakref.WeakKeyDictionary[nn.Module, Steps] = weakref.WeakKeyDictionary()


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


def hidden_beside(trainer: Trainer, pl_module: LightningModule) -> list[Any]:
    """Return who holds the optimizers that are known, and parameters that none of them holds.

    Takes a look at all objects of the process where anything is left to find, so ask once for each edit.
    """
    known = optimizers_of(trainer, pl_module)
    held = {id(p) for o in known for p in parameters_of(o)}
    left = [p for p in pl_module.parameters() if p.requires_grad and id(p) not in held]
    return owners([*_held_elsewhere(trainer, known), *left])


def _held_elsewhere(trainer: Trainer, optimizers: Sequence[Any]) -> list[Any]:
    """Return those with more references than the Trainer, its schedulers and Lightning's wrappers account for."""
    probe = (
        object()
    )  # held once, as each of those by its sequence; how much a count is off differs by version
    *counts, once = map(sys.getrefcount, [*optimizers, probe])
    holders = [*trainer.optimizers, *(w._optimizer for w in trainer.strategy._lightning_optimizers)]
    holders += [o for c in trainer.lr_scheduler_configs for o in _stepped_by(c.scheduler)]
    accounted = Counter(map(id, holders))
    return [
        o for o, count in zip(optimizers, counts, strict=True) if count - once != accounted[id(o)]
    ]


def _stepped_by(scheduler: Any) -> list[Any]:
    """Return the optimizer that a scheduler refers to, once for it and for each scheduler within."""
    inner = [o for one in getattr(scheduler, "_schedulers", ()) for o in _stepped_by(one)]
    return [scheduler.optimizer, *inner] if hasattr(scheduler, "optimizer") else inner


def optimizers_of(
    trainer: Trainer, pl_module: LightningModule, hidden: Sequence[Any] = ()
) -> list[Any]:
    """Return those of the Trainer, those inside them or held by the module, and those seen at work.

    Args:
        trainer: Of the fit.
        pl_module: Of the fit.
        hidden: Further places to look in, from `hidden_beside`.
    """
    steps = _WATCHED.get(pl_module)
    seen = steps.seen() if steps is not None else ()
    found = within(trainer.optimizers, pl_module, seen, [h for h in hidden if is_optimizer(h)])
    mine = {id(p) for p in pl_module.parameters()}
    # Those of the Trainer may hold parameters that came from elsewhere, such as projectors.
    given = within(trainer.optimizers)
    return [o for o in found if o in given or any(id(p) in mine for p in parameters_of(o))]


def shadows_of(trainer: Trainer, pl_module: LightningModule, hidden: Sequence[Any] = ()) -> Shadows:
    """Return the tensors that callbacks, the module, optimizers and the hidden keep beside parameters."""
    orders = _orders(optimizers_of(trainer, pl_module, hidden))
    return Shadows(pl_module, holders_of(trainer, pl_module, hidden), orders)


def holders_of(
    trainer: Trainer, pl_module: LightningModule, hidden: Sequence[Any] = ()
) -> dict[str, dict[str, Any]]:
    """Return what callbacks, the module, optimizers and the hidden hold, by the names of their attributes."""
    optimizers = optimizers_of(trainer, pl_module, hidden)
    holders = _held_by_optimizers(optimizers)
    known = {id(o) for o in optimizers}
    for one in hidden:
        if id(one) not in known:
            holders[_free(holders, getattr(one, "__name__", type(one).__name__))] = kept_by(one)
    for number, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
        if not isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            ours = type(callback).__module__.startswith("lightning_accel.")
            if not ours:
                holders[f"{type(callback).__name__}{number}"] = kept_by(callback)
    for name, module in pl_module.named_modules():
        holders[name or type(pl_module).__name__] = kept_by(module)
    return holders


def refuse_empty(optimizers: Sequence[Any], names: Mapping[int, str]) -> None:
    """Raise when an optimizer would have no parameter left: it could not be made again.

    Args:
        optimizers: All of them.
        names: Of parameters that go, by identity.
    """
    for optimizer in optimizers:
        held = [id(p) for p in parameters_of(optimizer)]
        if held and all(one in names for one in held):
            raise Unsupported(
                "an optimizer would be left without any parameter",
                f"{type(optimizer).__name__}, of `{names[held[0]]}` and others in blocks that go",
                "give the block's parameters to another optimizer, or keep it by `select`",
            )


def beside_blocks(
    trainer: Trainer,
    pl_module: LightningModule,
    names: Mapping[int, str],
    shadows: Shadows,
    hidden: Sequence[Any] = (),
) -> list[DroppedEntry]:
    """Return the entries that go with parameters of blocks, given by identity with their names."""
    if not names:
        return []
    own = set(names.values())
    kept = {id(shadow.tensor): shadow.name for shadow in shadows if shadow.name in own}
    return entries_of(holders_of(trainer, pl_module, hidden), {**names, **kept})


def kept_beside(optimizers: Sequence[Any], model: nn.Module) -> Shadows:
    """Return the tensors that optimizers keep beside parameters, as Lookahead its slow weights."""
    return Shadows(model, _held_by_optimizers(optimizers), _orders(optimizers))


def refuse_unclear(shadows: Shadows, parts: Mapping[str, Sequence[Tensor | None]]) -> None:
    """Raise when something kept could belong to several parameters, of which other parts are meant."""
    unclear = shadows.unclear(parts)
    if unclear:
        first = unclear[0]
        raise Unsupported(
            "a tensor kept beside the weights fits several of them, and nothing tells which is meant",
            f"`{first.where}`: {', '.join((first.name, *first.rivals))}",
            "keep a dict by the full names of parameters, `pl_module.named_parameters()`",
        )


def refuse_flat(shadows: Shadows) -> None:
    """Raise when someone keeps all weights in one vector, which no cut can follow."""
    if shadows.flat:
        raise Unsupported(
            "a vector of all weights cannot follow a prune",
            shadows.flat[0],
            "keep a dict by name instead, `{name: p.detach().clone() for name, p in ...}`",
        )


def _held_by_optimizers(optimizers: Sequence[Any]) -> dict[str, dict[str, Any]]:
    return {f"optimizer{n}": kept_by(one) for n, one in enumerate(optimizers)}


def _orders(optimizers: Sequence[Any]) -> list[list[nn.Parameter]]:
    """Return the orders in which optimizers have parameters: of each group, and of all together."""
    flat = [list(parameters_of(o)) for o in optimizers]
    return [*(group["params"] for o in optimizers for group in o.param_groups), *flat]


def _free(taken: Mapping[str, Any], name: str) -> str:
    return next(n for k in itertools.count() if (n := f"{name}{k}") not in taken)
