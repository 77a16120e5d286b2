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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_accel.errors import AccelError, explain
from lightning_accel.pruning import interop
from lightning_accel.surgery.call import in_precision

if TYPE_CHECKING:
    from lightning_accel.pruning.activations import Statistics
    from lightning_accel.pruning.graph import Group, Member
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

Importance = Union[str, Callable[[nn.Module, "Group"], Tensor], "Reconstruction"]
"""A name of `KNOWN`, a function of model and group that returns a number per unit, `Reconstruction`, or
an importance of torch-pruning."""


def check(importance: Any) -> Importance:
    """Return a known name or a function as it is, or raise `ValueError` that lists the names.

    >>> check("magnitude")
    'magnitude'
    """
    from lightning_accel.pruning.reconstruction import Reconstruction

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


def gate_gradient(model: nn.Module, group: Group) -> Tensor:
    """Return the loss's derivative by a gate on each unit (1 keeps it), from `.grad`, shape (units,).

    At the layers that read a unit it is the sum of weight times gradient over its columns, exactly.
    Where these are not all there (queries and keys are read by no weight), it is taken where the unit
    is made, at weights, biases and norms together.

    Raises:
        ValueError: No tensor of the group holds a gradient.
    """
    sides = [tensors_of(model, group, "in"), tensors_of(model, group, "out", "own")]
    parts = [[_gated(member, tensor) for member, tensor in side] for side in sides]
    if group.kind == "width":
        parts.reverse()
    whole = [side for side in parts if side and all(part is not None for part in side)]
    found = [part for side in whole or parts for part in side if part is not None]
    if not found:
        raise ValueError("none of its parameters holds a gradient")
    return _sum(found[: len(whole[0])] if whole else found)


def _gated(member: Member, tensor: Tensor) -> Tensor | None:
    gradient = tensor.grad
    return None if gradient is None else per_unit(_slopes(tensor, gradient), member)


def squares(model: nn.Module, group: Group) -> Tensor:
    """Return the squared norm of each unit's weights in all coupled layers, shape (units,).

    Raises:
        ValueError: The group has no weight.
    """
    parts = [
        per_unit(exact(tensor).abs().square(), member) for member, tensor in weights(model, group)
    ]
    if not parts:
        raise ValueError("none of its tensors is a weight")
    return _sum(parts)


def weights(model: nn.Module, group: Group, *roles: str) -> Iterator[tuple[Member, Tensor]]:
    """Yield the group's weights, no biases; a parametrized one as it is in the forward, once."""
    for member, tensor in tensors_of(model, group, *(roles or ("out", "in", "own"))):
        leaf = member.tensor.rpartition(".")[2]
        if leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_"):
            continue
        effective = effective_weight(model, member.tensor)
        if effective is None:
            yield member, tensor
        elif effective.shape == tensor.shape:
            yield member, effective


@torch.no_grad()
def effective_weight(model: nn.Module, name: str) -> Tensor | None:
    """Return the weight that is computed from a parameter (weight norm, masks), `None` if it is one itself."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path.partition(".parametrizations.")[0])
    if ".parametrizations." in f".{path}.":
        found = getattr(owner, path.rpartition(".")[2])
    else:
        base, _, kind = leaf.rpartition("_")
        hooks = [h for h in owner._forward_pre_hooks.values() if _is_of_torch(h)]
        if not hooks or kind not in ("g", "v", "orig") or base in owner._parameters:
            return None
        for hook in hooks:
            hook(owner, ())  # what it computed last may be older than the parameters
        found = vars(owner).get(base)
    return found.detach() if isinstance(found, Tensor) else None


def _is_of_torch(hook: object) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils")


def tensors_of(
    model: nn.Module, group: Group, *roles: str
) -> Iterator[tuple[Member, nn.Parameter]]:
    """Yield the group's floating point and complex parameters of these roles, tied ones under one name only."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    seen: list[tuple[nn.Parameter, Member]] = []
    for member in group.members:
        tensor = parameters.get(member.tensor)
        if tensor is None or member.role not in roles or not _is_number(tensor):
            continue
        if not any(tensor is other and _same_place(member, known) for other, known in seen):
            seen.append((tensor, member))
            yield member, tensor


def _same_place(member: Member, other: Member) -> bool:
    return member.dim == other.dim and torch.equal(member.positions, other.positions)


def per_unit(values: Tensor, member: Member) -> Tensor:
    """Sum elementwise values of a member's tensor over each unit, shape (units,).

    >>> from lightning_accel.pruning.graph import Member
    >>> rows = Member("weight", 0, "out", torch.tensor([[0, 2], [1, 3]]))
    >>> per_unit(torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]), rows)
    tensor([14, 22])
    """
    others = [dim for dim in range(values.dim()) if dim != member.dim]
    line = values.sum(others) if others else values
    return line[member.positions.to(line.device)].sum(1)


def exact(tensor: Tensor) -> Tensor:
    """Return the values in the widest floating point type that the device has, or complex one."""
    return in_precision(
        tensor.detach(), torch.float32 if tensor.device.type == "mps" else torch.float64
    )


def _slopes(tensor: Tensor, gradient: Tensor) -> Tensor:
    """Return the derivative of the loss by a real factor of each weight."""
    return (exact(tensor).conj() * exact(gradient)).real


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _magnitude(model: nn.Module, group: Group) -> Tensor:
    return _relative(squares(model, group))


def _bn_scale(model: nn.Module, group: Group) -> Tensor:
    scales = [per_unit(exact(tensor).abs(), member) for member, tensor in bn_scales(model, group)]
    if not scales:
        raise ValueError("it has no batch norm with a scale, which importance='bn_scale' reads")
    return _sum(scales) / len(scales)


def bn_scales(model: nn.Module, group: Group) -> Iterator[tuple[Member, nn.Parameter]]:
    """Yield the scales of the group's batch norms."""
    for member, tensor in tensors_of(model, group, "out", "own"):
        path, _, leaf = member.tensor.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(path), _BatchNorm):
            yield member, tensor


def _taylor(model: nn.Module, group: Group) -> Tensor:
    return gate_gradient(model, group).abs()


def _fpgm(model: nn.Module, group: Group) -> Tensor:
    squared = torch.zeros(group.units, group.units, dtype=torch.float64)
    found = False
    for member, tensor in weights(model, group, "out"):
        rows = exact(tensor).movedim(member.dim, 0).flatten(1)
        rows = torch.view_as_real(rows).flatten(1) if rows.is_complex() else rows
        rows = rows[member.positions.to(rows.device)].flatten(1)  # (units, weights of the unit)
        squared += _distances(rows).cpu()
        found = True
    if not found:
        raise ValueError("no layer's weights make it, which importance='fpgm' compares")
    return _relative(squared.sqrt().sum(1))


def _distances(rows: Tensor) -> Tensor:
    """Return squared distances between rows; centred first, so that little cancels."""
    rows = rows - rows.mean(0)
    products = rows @ rows.T
    lengths = products.diagonal()
    return (lengths[:, None] + lengths[None, :] - 2 * products).clamp_min(0.0)


def _lamp(model: nn.Module, group: Group) -> Tensor:
    squared = squares(model, group)
    order = squared.argsort(stable=True)
    ranked = squared[order]
    at_least = ranked.flip(0).cumsum(0).flip(0)
    shares = torch.where(at_least > 0, ranked / at_least, torch.zeros_like(ranked))
    return torch.empty_like(shares).index_copy_(0, order, shares)


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


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0].cpu()
    for part in parts[1:]:
        total = total + part.cpu()
    return total


_FORMULAS: dict[str, Callable[[nn.Module, Group], Tensor]] = {
    "magnitude": _magnitude,
    "bn_scale": _bn_scale,
    "taylor": _taylor,
    "fpgm": _fpgm,
    "lamp": _lamp,
    "random": _random,
}
