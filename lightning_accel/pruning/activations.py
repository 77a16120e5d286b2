"""What runs through the network on real data: how large each unit is, and how the loss hangs on it.

Activations are read where a unit is used, at the inputs of the layers that read it: after norms and
non-linearities, which is what removing it takes away. Gradients are squared per batch and then
averaged (in this order: the other one loses the curvature), on the gate of each unit rather than on
each weight, so that weights that work together count together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.exact import wide
from lightning_accel.pruning.coupled import gate_gradient
from lightning_accel.pruning.groups import Group, Member
from lightning_accel.surgery.call import Call, run, same_random_state

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Statistics:
    """Per group name, one number per unit, shape (units,), float64 on the CPU.

    `activation` is the mean |activation|, `squared_gradient` the mean over batches of the squared
    derivative of the loss by the unit's gate. Groups where nothing could be measured are missing.
    """

    activation: dict[str, Tensor] = field(default_factory=dict)
    squared_gradient: dict[str, Tensor] = field(default_factory=dict)

    def __or__(self, other: Statistics) -> Statistics:
        return Statistics(
            self.activation | other.activation, self.squared_gradient | other.squared_gradient
        )


@torch.no_grad()
def collect(
    model: nn.Module, groups: Sequence[Group], batches: Iterable[Sequence[Call]]
) -> Statistics:
    """Measure the mean |activation| of each unit over calibration batches, without labels.

    Args:
        model: Runs as it is: put it into eval mode first, and pass a twin if it must stay untouched.
        groups: Groups of this model.
        batches: The calls of each batch.

    >>> from lightning_accel.pruning.groups import Group, Member
    >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 1))
    >>> one = Group("0", "channels", 2, (Member("1.weight", 1, "in", torch.tensor([[0], [1]])),), (), 2)
    >>> calls = [Call("", (torch.tensor([[1.0, -3.0], [2.0, 3.0]]),), {})]
    >>> collect(net, [one], [calls]).activation["0"].tolist()
    [1.5, 3.0]
    """
    sums: dict[tuple[str, int], tuple[Tensor, int]] = {}
    with _watched(model, _readers(model, groups), sums), same_random_state(model):
        for calls in batches:
            run(model, calls)
    means: dict[str, list[Tensor]] = {}
    for group in groups:
        for index, member in enumerate(group.members):
            if (group.name, index) in sums:
                total, count = sums[group.name, index]
                mean = (total / count)[member.positions].mean(1)
                means.setdefault(group.name, []).append(mean)
    return Statistics(activation={name: torch.stack(m).mean(0) for name, m in means.items()})


def collect_gradients(
    model: nn.Module, groups: Sequence[Group], losses: Iterable[Tensor]
) -> Statistics:
    """Measure how much the loss of each batch hangs on each unit, squared and averaged.

    Args:
        model: Its gradients are overwritten and then cleared; pass a twin.
        groups: Groups of this model.
        losses: One scalar per batch (or per sample, which is nearer to the Fisher information),
            computed from this model; a generator keeps one graph alive at a time.
    """
    sums: dict[str, Tensor] = {}
    count = 0
    for loss in losses:
        model.zero_grad()
        loss.backward()
        count += 1
        for group in groups:
            if any(_holds_gradient(model, member) for member in group.members):
                squared = gate_gradient(model, group).square()
                sums[group.name] = sums.get(group.name, 0.0) + squared
    model.zero_grad()
    return Statistics(squared_gradient={name: total / count for name, total in sums.items()})


def _holds_gradient(model: nn.Module, member: Member) -> bool:
    path, _, leaf = member.tensor.rpartition(".")
    parameter = model.get_submodule(path)._parameters.get(leaf)
    return parameter is not None and parameter.grad is not None


_Reader = tuple[str, int, int]
"""Name of the group, index of the member in it, and size of the tensor's dimension."""


def _readers(model: nn.Module, groups: Sequence[Group]) -> dict[nn.Module, list[_Reader]]:
    found: dict[nn.Module, list[_Reader]] = {}
    tensors = dict(model.named_parameters(remove_duplicate=False))
    for group in groups:
        for index, member in enumerate(group.members):
            if member.role == "in" and member.tensor in tensors:
                owner = model.get_submodule(member.tensor.rpartition(".")[0])
                size = tensors[member.tensor].shape[member.dim]
                found.setdefault(owner, []).append((group.name, index, size))
    return found


@contextmanager
def _watched(
    model: nn.Module,
    readers: dict[nn.Module, list[_Reader]],
    sums: dict[tuple[str, int], tuple[Tensor, int]],
) -> Iterator[None]:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        for name, index, size in readers[module]:
            seen = None if given is None else _by_position(module, given, size)
            if seen is not None:
                total, count = sums.get((name, index), (torch.zeros((), dtype=torch.float64), 0))
                sums[name, index] = (total + wide(seen).sum(0).cpu().double(), count + len(seen))

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_position(module: nn.Module, given: Tensor, size: int) -> Tensor | None:
    """Return |inputs| as (samples, positions along the weight's dimension), or `None` if not so read."""
    if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)):
        rows = given.movedim(given.dim() - 1 - len(module.kernel_size), -1).reshape(
            -1, module.in_channels
        )
        if isinstance(module, _CONVOLUTIONS):  # one column serves the same place of every block
            rows = rows.reshape(-1, size)
    elif given.dim() and given.shape[-1] == size:
        rows = given.reshape(-1, size)
    else:
        return None
    return rows.abs()
