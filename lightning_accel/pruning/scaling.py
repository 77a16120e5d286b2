"""Scores of attention that depend on the width of a head, and the weights that put them right.

Attention divides the products of queries and keys by the root of a head's width. So a cut of that width
from `old` to `new` multiplies every score by sqrt(old / new), an error of some 8 % in a network's output,
unless the queries shrink by sqrt(new / old). Which rows make queries, fused or not, is read from gradients:
those that move the queries of a product and neither its keys nor its values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_accel.measure.flops import unfused
from lightning_accel.pruning.groups import Group
from lightning_accel.pruning.trace.symbolic_sizes import without_override
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call, run, same_random_state

PRODUCTS = ("scaled_dot_product_attention", "matmul", "__matmul__", "bmm")
"""Functions whose first two arguments may be queries and keys."""


class _Queries(TorchFunctionMode):
    """Collects the arguments of the products of two activations, in the order of their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Tensor, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in PRODUCTS:
            given = [*args, *kwargs.values()]
            self.found.append(tuple(t for t in given[:3] if isinstance(t, Tensor)))
            return func(*args, **kwargs)
        inner = without_override(func)
        if inner is None:
            return func(*args, **kwargs)
        with self:
            return inner(*args, **kwargs)


def query_rows(
    model: nn.Module,
    calls: Sequence[Call],
    sites: Mapping[str, Sequence[int]],
    groups: Sequence[Group],
    products: int,
) -> dict[str, dict[str, Tensor]]:
    """Return, per group, tensor name -> mask along its grouped dimension of what makes queries.

    Args:
        model: A network in eval mode; a copy of it runs.
        calls: Example calls.
        sites: For each group that is the width of heads, the numbers of its products.
        groups: The groups.
        products: How many products the trace saw.
    """
    copy = twin(model).requires_grad_(True).eval()
    with torch.enable_grad(), same_random_state(copy), unfused(copy), _Queries() as queries:
        run(copy, calls)
    if len(queries.found) != products:
        return {}  # the forward took another way with gradients; the proof will tell
    parameters = dict(copy.named_parameters(remove_duplicate=False))
    found: dict[str, dict[str, Tensor]] = {}
    for group in groups:
        makers = {
            m.tensor: (parameters[m.tensor], m.dim)
            for m in group.members
            if m.tensor in parameters and m.role in ("out", "own")
        }
        last = {
            name: (p, dim)
            for name, (p, dim) in makers.items()
            if name.rpartition(".")[0] not in group.layers and p.dim() == 1
        }
        for site in sites.get(group.name, ()):
            for some in (last, makers):
                rows = _rows(queries.found[site], some)
                if rows:
                    found.setdefault(group.name, {}).update(rows)
                    break
    return found


def _rows(
    operands: Sequence[Tensor], makers: Mapping[str, tuple[nn.Parameter, int]]
) -> dict[str, Tensor]:
    moved = [_moved_by(operand, makers) for operand in operands]
    rows = {}
    for name in makers:
        mine = moved[0].get(name)
        others = [other[name] for other in moved[1:] if name in other]
        if mine is not None:
            for other in others:
                mine = mine & ~other
            if mine.any():
                rows[name] = mine
    return rows


def _moved_by(tensor: Tensor, makers: Mapping[str, tuple[nn.Parameter, int]]) -> dict[str, Tensor]:
    if not tensor.requires_grad or not makers:
        return {}
    weights = [parameter for parameter, _ in makers.values()]
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(tensor.shape, generator=generator).to(tensor)
    try:
        gradients = torch.autograd.grad(
            tensor, weights, direction, retain_graph=True, allow_unused=True
        )
    except RuntimeError:
        return {}  # it is within a user's own autograd function: not scaled, and the proof will tell
    found = {}
    for (name, (parameter, dim)), gradient in zip(makers.items(), gradients, strict=True):
        if gradient is not None:
            others = [d for d in range(parameter.dim()) if d != dim]
            line = gradient.abs().sum(others) if others else gradient.abs()
            found[name] = line > 0
    return found


def factor(rows: Tensor, kept: Tensor | None, dim: int, dims: int, old: int, new: int) -> Tensor:
    """Return what to multiply the kept part of a tensor by, broadcast along its other dimensions.

    >>> factor(torch.tensor([True, True, False]), torch.tensor([0, 2]), 0, 2, 4, 1)
    tensor([[0.5000],
            [1.0000]], dtype=torch.float64)
    """
    scale = torch.ones(len(rows), dtype=torch.float64)
    scale[rows.cpu()] = math.sqrt(new / old)
    scale = scale if kept is None else scale[kept]
    return scale.view([-1 if d == dim else 1 for d in range(dims)])
