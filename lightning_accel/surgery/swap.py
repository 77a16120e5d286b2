"""Put another module in a module's place, everywhere the model holds it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lightning_accel.errors import NoEffect
from lightning_accel.surgery.receipt import Change, Kept, Moved, Receipt
from lightning_accel.surgery.select import Select


def swap(
    model: nn.Module,
    *,
    select: Select,
    make: Callable[[str, nn.Module], nn.Module | None],
) -> Receipt:
    """Replace each chosen module by what `make(name, module)` returns, in place.

    A module held in several places is replaced in all of them by one successor. The successor takes
    over the train flag, and a parameter of the same name and shape counts as moved, so that
    optimizers can `follow`. `make` returns `None` to leave a module as it is.

    Raises:
        NoEffect: Nothing was chosen, or `make` declined all of it.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> receipt = swap(net, select=Select(types=("ReLU",)), make=lambda name, module: nn.GELU())
    >>> net[1], receipt.changes[0].before
    (GELU(approximate='none'), 'ReLU')
    """
    chosen = {name: module for name, module in select.require(model).items() if name}
    changes: list[Change] = []
    moved: list[Moved] = []
    for name, old in chosen.items():
        new = make(name, old)
        if new is None or new is old:
            continue
        new.train(old.training)
        for parent in list(model.modules()):
            for leaf, child in parent._modules.items():
                if child is old:
                    parent._modules[leaf] = new
        changes.append(Change(name, "swapped", type(old).__name__, type(new).__name__))
        moved += _moves(name, old, new)
    if not changes:
        raise NoEffect(
            "nothing was swapped",
            f"{len(chosen)} modules chosen by {select}",
            "choose other modules",
        )
    return Receipt(tuple(changes), tuple(moved))


def _moves(prefix: str, old: nn.Module, new: nn.Module) -> list[Moved]:
    successors = dict(new.named_parameters())
    return [
        Moved(
            f"{prefix}.{name}", parameter, successors[name], tuple(parameter.shape), _all(parameter)
        )
        for name, parameter in old.named_parameters()
        if name in successors
        and successors[name] is not parameter
        and successors[name].shape == parameter.shape
    ]


def _all(parameter: nn.Parameter) -> Kept:
    return Kept((None,) * parameter.dim())
