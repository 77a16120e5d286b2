"""How much each unit of a group matters: one number per unit, the least goes first.

Per unit u, with w its weights in all coupled layers (rows of the layers that make it, columns of those
that read it) and g their gradients:

- `magnitude`: sum of w^2, biases and statistics left out (Li et al. 2017, arXiv:1608.08710; summed over
  a group as by Fang et al. 2023, arXiv:2301.12900), over the mean of its group.
- `bn_scale`: mean |scale| of its batch norms (Liu et al. 2017, arXiv:1708.06519); a group without batch
  norm is an error, because any stand-in would be another criterion under this name.
- `taylor`: |sum of w x g| over the columns that read it. Setting those columns to zero is the same as
  removing the unit, so this is the change of the loss to first order (Molchanov et al. 2019,
  arXiv:1906.10771); reads the `.grad` that the parameters hold.
- `taylor2`: the same sum squared per batch, then averaged: the diagonal of the Fisher information of a
  gate on the unit, the second-order term where the first vanishes (Theis et al. 2018, arXiv:1801.05787).
- `activation`: mean |activation| at the inputs of the layers that read it, over the mean of its group.
- `reconstruction`: the error of the layers that read it, units chosen together (see `reconstruction`).
- `fpgm`: distance to all other units of its group, small near their geometric median, hence redundant
  (He et al. 2019, arXiv:1811.00250), over the mean of its group.
- `lamp`: its magnitude over that of all units at least as large (Lee et al. 2021, arXiv:2010.07611).
- `random`: the baseline that a criterion has to beat; the same draw for the same network.

Scores of different groups can be ranked together: those without a common unit are divided by the mean
of their group, the others (losses, scales, shares) are left as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, explain
from lightning_accel.exact import wide
from lightning_accel.pruning import interop
from lightning_accel.pruning.activations import Statistics
from lightning_accel.pruning.coupled import (
    bn_scales,
    gate_gradient,
    per_unit,
    squares,
    total,
    weights,
)
from lightning_accel.pruning.groups import Group
from lightning_accel.pruning.reconstruction import Reconstruction

KNOWN = (
    "magnitude",
    "bn_scale",
    "taylor",
    "taylor2",
    "activation",
    "reconstruction",
    "fpgm",
    "lamp",
    "random",
)

Importance = str | Callable[[nn.Module, Group], Tensor] | Reconstruction
"""A name of `KNOWN`, a function of model and group that returns a number per unit, `Reconstruction`, or
an importance of torch-pruning."""


def check(importance: Any) -> Importance:
    """Return a known name or a function as it is, or raise `ValueError` that lists the names.

    >>> check("magnitude")
    'magnitude'
    """
    known = isinstance(importance, (str, Reconstruction)) or callable(importance)
    if isinstance(importance, type):
        name = importance.__name__
        raise TypeError(
            explain("`importance` is a class, not an object", name, f"pass `{name}(...)`")
        )
    if not known or (isinstance(importance, str) and importance not in KNOWN):
        raise ValueError(
            explain(
                "unknown importance",
                repr(importance),
                f"choose one of {', '.join(KNOWN)}, or pass a function (model, group) -> scores",
            )
        )
    checked: Importance = importance
    return checked


def require_gradients(model: nn.Module) -> None:
    """Raise unless some parameter holds a gradient."""
    if all(p.grad is None for p in model.parameters()):
        raise AccelError(
            "importance='taylor' reads gradients",
            "no parameter holds one",
            "call `loss.backward()` first, or use importance='magnitude'",
        )


def score(
    model: nn.Module,
    group: Group,
    importance: Importance,
    *,
    statistics: Statistics | None = None,
) -> Tensor:
    """Return one score per unit of a group, shape (units,), float32 on the CPU, all finite.

    Args:
        model: The network whose tensors the group names.
        group: Units that can be removed one by one.
        importance: One of `KNOWN`, or a function of the model and the group.
        statistics: What `activations` measured; read by "activation" and "taylor2".

    Raises:
        ValueError: The group has nothing to score this way, or a score is not finite.
    """
    if interop.is_of_torch_pruning(importance):
        found = interop.score(model, group, importance)
    elif callable(importance):
        found = torch.as_tensor(importance(model, group))
    elif importance in ("activation", "taylor2"):
        found = _measured(group, importance, statistics)
    elif isinstance(importance, str) and importance in _FORMULAS:
        found = _FORMULAS[importance](model, group)
    else:
        raise ValueError(f"{importance!r} ranks no group by itself")
    if found.shape != (group.units,):
        raise ValueError(f"it has {group.units} units, but scores of shape {tuple(found.shape)}")
    scores = found.detach().float().cpu()
    if not torch.isfinite(scores).all():
        raise ValueError("its weights, gradients or activations are not finite")
    return scores


def _magnitude(model: nn.Module, group: Group) -> Tensor:
    return _relative(squares(model, group))


def _bn_scale(model: nn.Module, group: Group) -> Tensor:
    scales = [per_unit(wide(tensor).abs(), member) for member, tensor in bn_scales(model, group)]
    if not scales:
        raise ValueError("it has no batch norm with a scale, which importance='bn_scale' reads")
    return total(scales) / len(scales)


def _taylor(model: nn.Module, group: Group) -> Tensor:
    return gate_gradient(model, group).abs()


def _fpgm(model: nn.Module, group: Group) -> Tensor:
    squared_UU = torch.zeros(group.units, group.units, dtype=torch.float64)
    found = False
    for member, tensor in weights(model, group, "out"):
        rows = wide(tensor).movedim(member.dim, 0).flatten(1)
        rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
        rows_UN = rows[member.positions.to(rows.device)].flatten(1)  # all weights of a unit
        squared_UU += _distances(rows_UN).cpu()
        found = True
    if not found:
        raise ValueError("no layer's weights make it, which importance='fpgm' compares")
    return _relative(squared_UU.sqrt().sum(1))


def _distances(rows_UN: Tensor) -> Tensor:
    """Return squared distances between rows; centred first, so that little cancels."""
    rows_UN = rows_UN - rows_UN.mean(0)
    products_UU = rows_UN @ rows_UN.T
    lengths_U = products_UU.diagonal()
    return (lengths_U[:, None] + lengths_U[None, :] - 2 * products_UU).clamp_min(0.0)


def _lamp(model: nn.Module, group: Group) -> Tensor:
    squared_U = squares(model, group)
    order_U = squared_U.argsort(stable=True)
    ranked_U = squared_U[order_U]
    at_least_U = ranked_U.flip(0).cumsum(0).flip(0)  # each unit with all that are larger
    shares_U = torch.where(at_least_U > 0, ranked_U / at_least_U, torch.zeros_like(ranked_U))
    return torch.empty_like(shares_U).index_copy_(0, order_U, shares_U)


def _random(_: nn.Module, group: Group) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()))
    return torch.rand(group.units, generator=generator)


def _measured(group: Group, importance: str, statistics: Statistics | None) -> Tensor:
    if statistics is None:
        raise ValueError(
            explain(
                f"importance={importance!r} reads what was measured on data",
                "no `statistics`",
                "measure them with `pruning.activations`, or use importance='magnitude'",
            )
        )
    table = statistics.activation if importance == "activation" else statistics.squared_gradient
    if group.name not in table:
        raise ValueError(f"nothing was measured there that importance={importance!r} could read")
    found = table[group.name]
    return _relative(found) if importance == "activation" else found


def _relative(scores: Tensor) -> Tensor:
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


_FORMULAS: dict[str, Callable[[nn.Module, Group], Tensor]] = {
    "magnitude": _magnitude,
    "bn_scale": _bn_scale,
    "taylor": _taylor,
    "fpgm": _fpgm,
    "lamp": _lamp,
    "random": _random,
}
