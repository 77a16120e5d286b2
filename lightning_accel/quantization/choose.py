"""Which layers of a network can be quantized, and why the others are left in floating point."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_accel.errors import NoEffect
from lightning_accel.quantization.grid import Grid
from lightning_accel.quantization.layers import KINDS, QuantizedLayer
from lightning_accel.surgery import Change, Receipt, Select

_MAYBE = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.RNNBase)


def why_not(model: nn.Module, select: Any, grid: Grid) -> dict[str, str]:
    """Tell for each chosen layer with weights why it stays in floating point, "" where it does not.

    Args:
        model: Holds the layers below it.
        select: A `Select`, a name pattern or several; `None` is all.
        grid: On which numbers they are to compute.

    >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.LSTM(4, 4))
    >>> why_not(net, None, Grid())
    {'0': '', '2': 'LSTM computes on its weights itself'}
    """
    chosen = Select.of(select).require(model)
    return {
        name: _reason(module, grid) for name, module in chosen.items() if isinstance(module, _MAYBE)
    }


def _reason(module: nn.Module, grid: Grid) -> str:
    if isinstance(module, QuantizedLayer):
        return "is quantized already"
    if is_parametrized(module):
        return "its weight is computed from others (torch.nn.utils.parametrize)"
    if type(module) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        return "its weight is read by the attention around it, and quantized with that"
    if isinstance(module, (nn.RNNBase, nn.EmbeddingBag)):
        return f"{type(module).__name__} computes on its weights itself"
    if type(module) not in KINDS:
        return f"{type(module).__name__} may compute in a way of its own"
    if grid.activations == "dynamic" and isinstance(module, _ConvNd):
        return "no kernel of convolutions finds ranges as it is called"
    if isinstance(module, nn.MultiheadAttention):
        return "" if grid.group is None else "groups of inputs are those of linear layers"
    weight = module._parameters.get("weight")
    if weight is None and hasattr(module, "weight"):
        return "its weight is computed from others before each call"
    if weight is None or is_lazy(weight):
        return "its weight is made by its first call"
    if not weight.is_floating_point():
        return f"its weight is of type {weight.dtype}"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "its rows are rescaled as they are read (max_norm)"
        return "" if grid.group is None else "groups of inputs are those of linear layers"
    if grid.group is not None:
        if not isinstance(module, nn.Linear):
            return "groups of inputs are those of linear layers"
        if module.in_features % grid.group:
            return f"its {module.in_features} inputs are no multiple of group={grid.group}"
    return ""


def require(model: nn.Module, select: Any, grid: Grid) -> Receipt:
    """Return what would change and what is left alone.

    Raises:
        NoEffect: Nothing would change.
    """
    reasons = why_not(model, select, grid)
    changes = tuple(
        Change(name, "quantized", type(model.get_submodule(name)).__name__, str(grid))
        for name, reason in reasons.items()
        if not reason
    )
    skipped = tuple(Change(name, reason) for name, reason in reasons.items() if reason)
    if not changes:
        raise no_effect(model, skipped)
    return Receipt(changes, (), skipped)


def no_effect(model: nn.Module, skipped: Iterable[Change]) -> NoEffect:
    """Return the error for a network of which no layer is left."""
    listed = "; ".join(f"`{change.name}`: {change.what}" for change in [*skipped][:6])
    return NoEffect(
        "no layer is left to quantize",
        listed or f"no linear layer, convolution or embedding in {type(model).__name__}",
        "choose others with `select`, or leave quantization out",
    )
