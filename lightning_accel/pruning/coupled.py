"""The tensors that a group of units couples, and what they sum to per unit.

Names of tensors end in their dimensions: U units, P places of one unit, and N all other elements.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_accel.exact import wide
from lightning_accel.pruning.groups import Group, Member


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
    return total(found[: len(whole[0])] if whole else found)


def _gated(member: Member, tensor: Tensor) -> Tensor | None:
    gradient = tensor.grad
    return None if gradient is None else per_unit(_slopes(tensor, gradient), member)


def squares(model: nn.Module, group: Group, *, there: bool = False) -> Tensor:
    """Return the squared norm of each unit's weights in all coupled layers, shape (units,).

    Args:
        model: The network.
        group: One of its groups.
        there: Whether the result stays on the weights' device, which is then not waited for.

    Raises:
        ValueError: The group has no weight.
    """
    parts = [
        per_unit(wide(tensor).abs().square(), member) for member, tensor in weights(model, group)
    ]
    if not parts:
        raise ValueError("none of its tensors is a weight")
    return total(parts, there=there)


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

    >>> from lightning_accel.pruning.groups import Member
    >>> rows = Member("weight", 0, "out", torch.tensor([[0, 2], [1, 3]]))
    >>> per_unit(torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]), rows)
    tensor([14, 22])
    """
    others = [dim for dim in range(values.dim()) if dim != member.dim]
    line = values.sum(others) if others else values
    parts_UP = line[member.positions.to(line.device)]
    return parts_UP.sum(1)


def _slopes(tensor: Tensor, gradient: Tensor) -> Tensor:
    """Return the derivative of the loss by a real factor of each weight."""
    return (wide(tensor).conj() * wide(gradient)).real


def _is_number(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def bn_scales(model: nn.Module, group: Group) -> Iterator[tuple[Member, nn.Parameter]]:
    """Yield the scales of the group's batch norms."""
    for member, tensor in tensors_of(model, group, "out", "own"):
        path, _, leaf = member.tensor.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(path), _BatchNorm):
            yield member, tensor


def total(parts_U: list[Tensor], *, there: bool = False) -> Tensor:
    """Return the sum of what several tensors say of each unit, shape (units,), on the CPU or on the first's device."""
    sum_U = parts_U[0]
    for part_U in parts_U[1:]:
        sum_U = sum_U + part_U.to(sum_U.device)
    return sum_U if there else sum_U.cpu()
