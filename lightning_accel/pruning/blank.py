"""A network run as if what a cut removes were nothing, with all of it still in place.

Zeros in a weight are nothing only where the weight is used as it is: `softplus(0)` is 0.69, and a weight norm
scales up what is left. So a mask is not written into a parameter. It goes along with it through what only
reorders it or changes it number by number, and multiplies it where it meets anything else: what a layer
computes with is masked, not what that is made from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

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


class Blank(TorchDispatchMode):
    """Makes nothing of what a cut removes.

    Args:
        model: The network for which the cut was made; it is not changed.
        cut: The cut.
        nothing: What stands for zero; a tiny number where zero would be divided by zero.
    """

    def __init__(self, model: nn.Module, cut: Cut, nothing: float = 0.0) -> None:
        super().__init__()
        self._masks: Any = WeakTensorKeyDictionary()
        self._own: Any = WeakTensorKeyDictionary()  # what hangs on parameters and buffers only
        for name, tensor in named_tensors(model):
            self._own[tensor] = True
            numbers = tensor.is_floating_point() or tensor.is_complex()
            if name in cut.kept and numbers and tensor not in self._masks:
                like = torch.empty_like(tensor, dtype=tensor.real.dtype)
                self._masks[tensor] = cut.mask(name, like).clamp_min(nothing)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        own = all(t in self._own for t in given)
        masked = any(t in self._masks for t in given)
        if masked and own and not func._schema.is_mutable and not _complex(given):
            result = self._carried(func, given, args, kwargs)
        else:
            if masked and func._schema.is_mutable:
                self._write(args, kwargs)
            elif masked:
                args, kwargs = tree_map(self._applied, (args, kwargs))
            result = func(*args, **kwargs)
        if own:
            for tensor in _tensors(result):
                self._own[tensor] = True
        return result

    def _carried(self, func: Any, given: list[Tensor], args: Any, kwargs: Any) -> Any:
        """Run a function of parameters only; its result keeps the mask, where there is such a thing."""
        name = str(func._schema.name).removeprefix("aten::")
        if name in _REORDERING:
            result = func(*args, **kwargs)
            masks = func(*tree_map(self._mask, args), **kwargs)
            for tensor, mask in zip(_tensors(result), _tensors(masks), strict=True):
                self._masks[tensor] = mask
            return result
        if name == _OWN_NORM:
            direction, magnitude, *rest = args
            result = func(direction, self._applied(magnitude), *rest, **kwargs)
            self._masks[result[0]] = self._mask(direction)
            return result
        if torch.Tag.pointwise in func.tags or name == "_to_copy":
            result = func(*args, **kwargs)
            held = [self._masks[t] for t in given if t in self._masks]
            for tensor in _tensors(result):
                mask = held[0]
                for other in held[1:]:
                    mask = mask * other
                self._masks[tensor] = mask.expand(tensor.shape)
            return result
        args, kwargs = tree_map(self._applied, (args, kwargs))
        return func(*args, **kwargs)

    def _mask(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        mask = self._masks.get(value)
        return torch.ones_like(value) if mask is None else mask

    def _applied(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value in self._masks:
            return value * self._masks[value].to(value.real.dtype)
        return value

    def _write(self, args: Any, kwargs: Any) -> None:
        """Write masks into tensors that a function is about to change in place."""
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor) and value in self._masks:
                value.mul_(self._masks.pop(value).to(value.real.dtype))


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in tree_leaves(result) if isinstance(t, Tensor)]


def _complex(given: list[Tensor]) -> bool:
    """Whether complex numbers are among these: the functions that make and part them know no mask."""
    return any(t.is_complex() for t in given)
