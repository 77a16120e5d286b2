"""What else a cut has to be right on: other weights and inputs than a network happens to have.

Behind weights that begin as zeros or inputs that are all the same any cut would be right, and so would one of
units that are dead on the example, or one that takes one size for another that is equal there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call, is_plain, tensors

_SIZES = 3  # of the sizes of its input that a network may take otherwise


def resized(calls: Sequence[Call]) -> Iterator[tuple[Call, ...]]:
    """Yield the calls with one size of their tensors, wherever it stands, half as large again, or halved.

    >>> [tuple(c[0].args[0].shape) for c in resized([Call("", (torch.ones(2, 3, 8, 8),), {})])]
    [(2, 3, 12, 12), (2, 3, 4, 4), (2, 4, 8, 8), (2, 1, 8, 8)]
    """
    held = tensors([(c.args, c.kwargs) for c in calls])
    sizes = Counter(n for t in held if is_plain(t) for n in t.shape[1:] if n > 1)
    for size, _ in sizes.most_common(_SIZES):
        for other in (size * 3 // 2, size // 2):
            change = partial(_resized, size=size, other=other)
            yield tuple(Call(c.name, *tree_map(change, (c.args, c.kwargs))) for c in calls)


def _resized(value: Any, *, size: int, other: int) -> Any:
    if is_plain(value):
        for dim in range(1, value.dim()):
            if value.shape[dim] == size:
                places = torch.arange(other, device=value.device) % size
                value = value.index_select(dim, places)
    return value


def opposite(model: nn.Module) -> nn.Module:
    """Return a copy with the signs of all weights turned: what is dead on these calls lives there."""
    copy = twin(model)
    for parameter in copy.parameters():
        if parameter.numel() > 1 and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.data = -parameter.data
    return copy


def shaken(model: nn.Module, amount: float = 0.1, *, seed: int = 0) -> nn.Module:
    """Return a copy with each weight changed by a random share of it, of this size on average."""
    copy, generator = twin(model), torch.Generator().manual_seed(seed)
    for parameter in copy.parameters():
        share = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = parameter.data * (1 + amount * share.to(parameter.data.real))
    return copy


def lively(model: nn.Module) -> Iterator[nn.Module]:
    """Yield copies whose outputs may hang on their weights where those of the model are stuck at a bound."""
    for scale in (0.3, 0.03):
        copy = twin(model)
        for parameter in copy.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.data = parameter.data * scale
        yield copy
    for seed in range(1, 4):
        yield shaken(model, 1.0, seed=seed)


def vary(model: nn.Module) -> None:
    """Give parameters whose values are all the same different ones, in place.

    Behind a norm whose weights begin as zeros, any cut would be right, until it learns.
    """
    for parameter in model.parameters():
        is_closed = parameter.numel() == 1 and parameter.is_floating_point() and not parameter.any()
        # A gate that begins closed, as ReZero's, hides all behind it.
        parameter.data = torch.full_like(parameter, 0.5) if is_closed else _varied(parameter.data)


def varied_calls(calls: Sequence[Call]) -> tuple[Call, ...]:
    def vary(value: Any) -> Any:
        return _varied(value) if isinstance(value, Tensor) else value

    return tuple(Call(c.name, *tree_map(vary, (c.args, c.kwargs))) for c in calls)


def _varied(tensor: Tensor) -> Tensor:
    if not is_plain(tensor) or tensor.numel() < 2 or not tensor.is_floating_point():
        return tensor
    if tensor.min() != tensor.max():
        return tensor
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) + 0.5
    constant = float(tensor.flatten()[0])
    size = min(max(abs(constant), 0.1), 10.0)
    return shares * (-size if constant < 0 else size)
