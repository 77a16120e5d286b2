"""Penalties that make units small before they are cut, as gradients to add to the loss's own.

With w_u the weights of unit u in all coupled layers (rows and columns; biases are left out):

- `slimming`: strength * sum |scale| of batch norms (network slimming, Liu et al. 2017,
  arXiv:1708.06519).
- `group_lasso`: strength * sum_u ||w_u||_2, over all coupled layers at once (Fang et al. 2023,
  arXiv:2301.12900). Its gradient at a unit of zeros is taken as zero, the smallest subgradient.
- `growing`: 1/2 sum_u s_u ||w_u||_2^2, where s_u rises step by step for the units picked to go and is
  zero for all others (Wang et al. 2021, arXiv:2012.09243).

Added between backward and the optimizer's step, these are exact and cost no graph. No unit is
compared with the others of its group, so a group of one unit, or of equal ones, is nothing special.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from lightning_accel.errors import NoEffect
from lightning_accel.exact import wide
from lightning_accel.pruning.coupled import bn_scales, squares, weights
from lightning_accel.pruning.groups import Group, Member
from lightning_accel.pruning.masks import part
from lightning_accel.pruning.selection import choose
from lightning_accel.surgery import Kept, Receipt

Penalty = Literal["slimming", "group_lasso", "growing"]
PENALTIES = get_args(Penalty)

Gradients = dict[str, Tensor]
"""By name of the parameter, the penalty's gradient, in the parameter's shape."""


def slimming(model: nn.Module, groups: Sequence[Group], *, strength: float) -> Gradients:
    """Return the gradient of strength * sum |scale| over the groups' batch norms.

    Raises:
        NoEffect: No group has a batch norm with a scale.
    """
    found: Gradients = {}
    for group in groups:
        for member, scale in bn_scales(model, group):
            share = torch.full((group.units,), strength, dtype=torch.float64)
            _add(found, member.tensor, scale.detach().sign() * _along(member, scale, share))
    if not found:
        raise NoEffect(
            "network slimming acts on scales of batch norms",
            f"none in the {len(groups)} groups that can be pruned",
            "use penalty='group_lasso', which acts on weights",
        )
    return found


def group_lasso(model: nn.Module, groups: Sequence[Group], *, strength: float) -> Gradients:
    """Return the gradient of strength * sum of the units' norms.

    Raises:
        NoEffect: No group has a weight.
    """
    found: Gradients = {}
    for group in groups:
        if any(True for _ in weights(model, group)):
            norms = squares(model, group, there=True).sqrt()
            share = torch.where(norms > 0, strength / norms, torch.zeros_like(norms))
            _add_scaled(found, model, group, share)
    return _require(found, groups)


def growing(
    model: nn.Module, groups: Sequence[Group], *, strengths: Mapping[str, Tensor]
) -> Gradients:
    """Return the gradient of half the units' squared norms times their strengths.

    Args:
        model: The network.
        groups: Groups of this model.
        strengths: One per unit, shape (units,), by name of the group; groups without are left alone.

    Raises:
        NoEffect: None of these groups has a weight.
    """
    found: Gradients = {}
    for group in groups:
        if group.name in strengths:
            _add_scaled(found, model, group, strengths[group.name])
    return _require(found, groups)


def pick(model: nn.Module, groups: Sequence[Group], *, ratio: float) -> dict[str, Tensor]:
    """Return which units a growing penalty shall drive out: a share of each group, small ones first.

    One boolean per unit, shape (units,), by name of the group; groups without weights are left out.
    """
    sized = [group for group in groups if any(True for _ in weights(model, group))]
    gone = choose(sized, {g.name: squares(model, g).float() for g in sized}, ratio=ratio)
    picked = {group.name: torch.zeros(group.units, dtype=torch.bool) for group in sized}
    for name, units in gone.items():
        picked[name][units] = True
    return picked


@torch.no_grad()
def add_to_grad(
    model: nn.Module, gradients: Gradients, *, held: Iterable[nn.Parameter] | None = None
) -> int:
    """Add a penalty's gradients to `.grad`, in place, and return to how many parameters.

    Parameters without a gradient took no part in the loss; they would not move, and are left alone.

    Args:
        model: The network.
        gradients: What a penalty returned; of gradients that are sharded, this process's part.
        held: Only these parameters: those of the optimizer that is about to step. All by default.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    allowed = {id(p) for p in (parameters.values() if held is None else held)}
    count = 0
    for name, gradient in gradients.items():
        parameter = parameters[name]
        if parameter.grad is not None and id(parameter) in allowed:
            part(parameter.grad).add_(gradient.to(parameter.grad.dtype))
            count += 1
    return count


def _add_scaled(found: Gradients, model: nn.Module, group: Group, share: Tensor) -> None:
    """Add each unit's weights times its share to what was found for their tensors."""
    for member, tensor in weights(model, group):
        _add(found, member.tensor, wide(tensor) * _along(member, tensor, share))


def _add(found: Gradients, name: str, gradient: Tensor) -> None:
    found[name] = found[name] + gradient if name in found else gradient


def _along(member: Member, tensor: Tensor, share: Tensor) -> Tensor:
    """Spread one number per unit over the positions of the member's dimension, to broadcast."""
    share = share.to(wide(tensor[:0]).dtype).to(tensor.device)  # the host does not wait for it
    line = share.new_zeros(tensor.shape[member.dim])
    line[member.positions.to(tensor.device)] = share[:, None]
    return line.view([-1 if dim == member.dim else 1 for dim in range(tensor.dim())])


def _require(found: Gradients, groups: Sequence[Group]) -> Gradients:
    if not found:
        raise NoEffect(
            "the penalty acts on weights",
            f"none in the {len(groups)} groups that can be pruned",
            "choose other layers by `select`",
        )
    return found


def follow_picked(
    picked: Mapping[str, Tensor],
    before: Sequence[Group],
    after: Sequence[Group],
    receipt: Receipt,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return who is still picked after a cut, and the names of groups that could not follow.

    Args:
        picked: One boolean per unit of the groups before the cut.
        before: The groups before the cut.
        after: The groups after it, of the same names.
        receipt: What the cut returned.
    """
    moved = {move.name: move.kept for move in receipt.moved}
    units = {group.name: group.units for group in after}
    followed: dict[str, Tensor] = {}
    lost: list[str] = []
    for group in before:
        if group.name in picked:
            left = picked[group.name][_survivors(group, moved)]
            if len(left) == units.get(group.name):
                followed[group.name] = left
            else:
                lost.append(group.name)
    return followed, lost


def _survivors(group: Group, moved: Mapping[str, Kept]) -> Tensor:
    """Return which units of a group a cut left, read off the first of its tensors that was cut."""
    for member in group.members:
        kept = moved.get(member.tensor)
        left = None if kept is None or kept.flat is not None else kept.dims[member.dim]
        if left is not None:
            return torch.isin(member.positions, left).all(1)
    return torch.ones(group.units, dtype=torch.bool)
