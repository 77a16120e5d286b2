"""Parameters that come to a running fit: they join the optimizer that trains their neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.surgery.optimizers import parameters_of, within

_OF_A_GROUP = (
    "base_lrs",
    "lr_lambdas",
    "min_lrs",
    "_last_lr",
    "max_lrs",
    "base_momentums",
    "max_momentums",
)
"""Lists of schedulers with one entry for each group."""


def join(
    optimizers: Sequence[Any],
    schedulers: Sequence[Any],
    parameters: Iterable[nn.Parameter],
    *,
    beside: nn.Module,
) -> None:
    """Add the parameters that no optimizer holds, as a group with the settings of `beside`'s first one.

    Learning-rate schedulers of that optimizer treat the new group as that one too.

    Args:
        optimizers: Of the fit.
        schedulers: Of the fit.
        parameters: To be trained.
        beside: The network whose optimizer it is to be.

    Raises:
        AccelError: No optimizer trains `beside`.
        Unsupported: The optimizer takes one group only.

    >>> net, more = nn.Linear(2, 2), nn.Linear(1, 1)
    >>> adam = torch.optim.Adam(net.parameters(), lr=0.5)
    >>> join([adam], [], more.parameters(), beside=net)
    >>> len(adam.param_groups), adam.param_groups[1]["lr"]
    (2, 0.5)
    """
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    new = [p for p in parameters if id(p) not in held]
    if not new:
        return
    optimizer, index = _home(optimizers, {id(p) for p in beside.parameters()})
    if isinstance(optimizer, torch.optim.LBFGS):
        raise Unsupported(
            "projectors cannot join an optimizer of one group",
            "LBFGS",
            "use another optimizer, or a loss without projectors",
        )
    settings = {k: v for k, v in optimizer.param_groups[index].items() if k != "params"}
    settings.pop("param_names", None)
    count = len(optimizer.param_groups)
    optimizer.add_param_group({"params": new, **settings})
    for scheduler in schedulers:
        _extend(scheduler, optimizer, index, count)
    for inner in within(optimizer)[1:]:
        # One that shares the groups, or was told by the one around it, has them already.
        if not {id(p) for p in new} & {id(p) for p in parameters_of(inner)}:
            join([inner], schedulers, new, beside=beside)


def part(
    optimizers: Sequence[Any], schedulers: Sequence[Any], parameters: Iterable[nn.Parameter]
) -> None:
    """Take back what `join` did for these parameters.

    >>> net, more = nn.Linear(2, 2), nn.Linear(1, 1)
    >>> adam = torch.optim.Adam(net.parameters(), lr=0.5)
    >>> join([adam], [], more.parameters(), beside=net)
    >>> part([adam], [], more.parameters())
    >>> len(adam.param_groups)
    1
    """
    gone = {id(p): p for p in parameters}
    for optimizer in optimizers:
        for inner in within(optimizer):
            count = len(inner.param_groups)
            joined = [
                i
                for i, g in enumerate(inner.param_groups)
                if {id(p) for p in g["params"]} & set(gone)
            ]
            for index in reversed(joined):
                del inner.param_groups[index]
                for scheduler in schedulers:
                    _shrink(scheduler, inner, index, count)
            for parameter in gone.values() if gone else ():
                inner.state.pop(parameter, None)


def _shrink(scheduler: Any, optimizer: Any, index: int, count: int) -> None:
    for inner in getattr(scheduler, "_schedulers", ()):
        _shrink(inner, optimizer, index, count)
    if getattr(scheduler, "optimizer", None) is optimizer:
        for name in _OF_A_GROUP:
            values = getattr(scheduler, name, None)
            if isinstance(values, list) and len(values) == count:
                del values[index]


def _home(optimizers: Sequence[Any], ids: set[int]) -> tuple[Any, int]:
    for optimizer in optimizers:
        for index, group in enumerate(optimizer.param_groups):
            if any(id(p) in ids for p in group["params"]):
                return optimizer, index
    raise AccelError(
        "no optimizer trains the student",
        f"{len(optimizers)} optimizers, none with a parameter of it",
        "return one from `configure_optimizers` that holds the student's parameters",
    )


def _extend(scheduler: Any, optimizer: Any, index: int, count: int) -> None:
    for inner in getattr(scheduler, "_schedulers", ()):
        _extend(inner, optimizer, index, count)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        return
    for name in _OF_A_GROUP:
        values = getattr(scheduler, name, None)
        if isinstance(values, list) and len(values) == count:
            values.append(values[index])
