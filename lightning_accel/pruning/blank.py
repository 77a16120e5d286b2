"""A network run as if what a cut removes were nothing, with all of it still in place.

Zeros in a weight are nothing only where the weight is used as it is: `softplus(0)` is 0.69, and a weight norm
scales up what is left. So a mask is not written into a parameter. It goes along with it through what only
reorders it or changes it number by number, and multiplies it where it meets anything else: what a layer
computes with is masked, not what that is made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial, reduce
from operator import mul
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lightning_accel.surgery import Cut
from lightning_accel.surgery.structure import named_tensors

_REORDERING = {
    *(
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "permute",
        "transpose",
        "t",
        "unsqueeze",
    ),
    *("squeeze", "expand", "slice", "select", "unbind", "split", "split_with_sizes", "chunk"),
    *("clone", "detach", "alias", "narrow", "repeat", "flip", "roll", "cat", "stack", "contiguous"),
}
_OWN_NORM = "_weight_norm_interface"


_VIEWING = {"view", "_unsafe_view", "_reshape_alias"}
"""Of those, what needs its numbers to lie as those of the tensor do."""

Masks = Mapping[str, Tensor]
"""By name of a tensor, ones where a cut keeps its elements, and nothing elsewhere."""


def masks(model: nn.Module, cut: Cut, nothing: float = 0.0) -> Masks:
    """Return a mask for each tensor of numbers that a cut makes smaller.

    Args:
        model: The network for which the cut was made.
        cut: The cut.
        nothing: What stands for zero; a tiny number where zero would be divided by zero.
    """
    tensors = dict(named_tensors(model))
    return {
        name: cut.mask(name, tensors[name].detach().real, nothing)
        for name in cut.kept
        if tensors[name].is_floating_point() or tensors[name].is_complex()
    }


class Blank(TorchDispatchMode):
    """Makes nothing of what a cut removes.

    Args:
        model: The network for which the cut was made; it is not changed.
        masks: Of the cut.
        run: How to run an operation.
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Masks,
        run: Callable[[Any, Any, Any], Any] = lambda func, args, kwargs: func(*args, **kwargs),
    ) -> None:
        super().__init__()
        self._run = run
        self._masks: dict[int, Tensor] = {}
        self._own: dict[int, Tensor] = {}  # what hangs on parameters and buffers only
        for name, tensor in named_tensors(model):
            self._own[id(tensor)] = tensor
            if name in masks:
                self._masks.setdefault(id(tensor), masks[name])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        own = all(id(t) in self._own for t in given)
        masked = any(id(t) in self._masks for t in given)
        if masked and own and not func._schema.is_mutable and not _complex(given):
            result = self._carried(func, given, args, kwargs)
        else:
            if masked and func._schema.is_mutable:
                self._write(given)
            elif masked:
                args, kwargs = tree_map(self._applied, (args, kwargs))
            result = self._run(func, args, kwargs)
        if own:
            self._own.update((id(t), t) for t in _tensors(result))
        return result

    def _carried(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Run a function of parameters only; its result keeps the mask, where there is such a thing."""
        name = str(func._schema.name).removeprefix("aten::")
        if name in _REORDERING:
            result = func(*args, **kwargs)
            of = partial(self._mask, lies=name in _VIEWING)
            made = func(*tree_map(of, args), **kwargs)
            for tensor, mask in zip(_tensors(result), _tensors(made), strict=True):
                self._keep(tensor, mask)
            return result
        if name == _OWN_NORM:
            direction, magnitude, *rest = args
            result = func(direction, self._applied(magnitude), *rest, **kwargs)
            self._keep(result[0], self._mask(direction))
            return result
        if torch.Tag.pointwise in func.tags or name == "_to_copy":
            result = func(*args, **kwargs)
            held = [self._masks[id(t)] for t in given if id(t) in self._masks]
            for tensor in _tensors(result):
                self._keep(tensor, reduce(mul, held).expand(tensor.shape))
            return result
        args, kwargs = tree_map(self._applied, (args, kwargs))
        return self._run(func, args, kwargs)

    def _keep(self, tensor: Tensor, mask: Tensor) -> None:
        self._own[id(tensor)], self._masks[id(tensor)] = tensor, mask

    def _mask(self, value: Any, lies: bool = False) -> Any:
        if not isinstance(value, Tensor):
            return value
        mask = self._masks.get(id(value))
        mask = torch.ones_like(value) if mask is None else mask
        return torch.empty_like(value, dtype=mask.dtype).copy_(mask) if lies else mask

    def _applied(self, value: Any) -> Any:
        if isinstance(value, Tensor) and id(value) in self._masks:
            return value * self._masks[id(value)].to(value.real.dtype)
        return value

    def _write(self, given: list[Tensor]) -> None:
        """Write masks into tensors that a function is about to change in place."""
        for value in given:
            if id(value) in self._masks:
                value.mul_(self._masks.pop(id(value)).to(value.real.dtype))


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


def _complex(given: list[Tensor]) -> bool:
    """Whether complex numbers are among these: the functions that make and part them know no mask."""
    return any(t.is_complex() for t in given)
