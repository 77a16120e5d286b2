"""The memory format of convolutions: channels last, weights and inputs alike.

Fast convolution kernels, above all those of tensor cores and of oneDNN, want the channels of one pixel side
by side. It pays for ordinary convolutions in a short format, and can cost for grouped and depthwise ones;
over 834 public networks the median gain in training was 1.12x and 156 became slower. So it is a switch of
its own, and `AccelReport` tells what it gave.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from lightning_accel.errors import NoEffect
from lightning_accel.surgery import Change, Receipt, Select


def channels_last(
    model: nn.Module, *, select: Select | str | Iterable[str] | None = None
) -> Receipt:
    """Store the weights of two-dimensional convolutions channels last, in place; idempotent.

    Parameters stay the same objects. Values, state dict and later loads are not affected.

    Raises:
        NoEffect: Nothing was chosen, or there is no two-dimensional convolution in it.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> channels_last(net).changes[0]
    Change(name='0.weight', what='memory format', before='contiguous', after='channels last')
    """
    changes = []
    for name, module in convolutions(model, select=select).items():
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        if not weight.is_contiguous(memory_format=torch.channels_last):
            changes.append(
                Change(f"{name}.weight".lstrip("."), "memory format", "contiguous", "channels last")
            )
            _store(weight, torch.channels_last)
    return Receipt(tuple(changes))


def contiguous(model: nn.Module, receipt: Receipt) -> None:
    """Store again as they were the weights that `channels_last` changed, and that are still there.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> contiguous(net, channels_last(net))
    >>> net[0].weight.is_contiguous()
    True
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for change in receipt.changes:
        if change.name in weights:
            _store(weights[change.name], torch.contiguous_format)


def convolutions(
    model: nn.Module, *, select: Select | str | Iterable[str] | None = None
) -> dict[str, nn.Module]:
    """Return the chosen two-dimensional convolutions by name, and raise `NoEffect` if there are none."""
    select = Select.of(select)
    found = {n: m for n, m in select.require(model).items() if _is_convolution(m)}
    if not found:
        raise NoEffect(
            "channels last is for two-dimensional convolutions",
            f"none in {type(model).__name__} among {select}",
            "leave the memory format as it is",
        )
    return found


def convert_inputs(
    model: nn.Module, *, select: Select | str | Iterable[str] | None = None
) -> list[RemovableHandle]:
    """Let the children of `model` that hold chosen convolutions take their images channels last."""
    names = {name.partition(".")[0] for name in convolutions(model, select=select)}
    return [
        model.get_submodule(name).register_forward_pre_hook(_convert, with_kwargs=True)
        for name in sorted(names)
    ]


def _store(weight: nn.Parameter, format: torch.memory_format) -> None:
    weight.data = weight.data.contiguous(memory_format=format)
    if weight.grad is not None:
        weight.grad = weight.grad.contiguous(memory_format=format)


def _is_convolution(module: nn.Module) -> bool:
    # Not `module.weight`: that of a parametrized layer is computed anew, and spectral norm's vectors move with it.
    weight = module._parameters.get("weight")
    kind = (nn.Conv2d, nn.ConvTranspose2d)
    return isinstance(module, kind) and weight is not None and weight.dim() == 4


def _convert(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tree_map(_channels_last, (args, kwargs))


def _channels_last(value: Any) -> Any:
    images = isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point()
    return value.contiguous(memory_format=torch.channels_last) if images else value
