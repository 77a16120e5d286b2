"""Doubts about a prune: of a network that looks untrained, or of which almost nothing is left.

What channels are worth is read from weights, so these must have been trained.

Norms are initialised with one value for all channels, and a single step of training makes them differ.
Where there is none, torch's own initialisation of layers keeps every weight within 1 / sqrt(fan in).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lightning_accel.errors import explain

UNTRAINED = explain(
    "StructuredPruning cuts before the first step, and the network looks untrained: its weights are as "
    "initialised, so that what its channels are worth is chance",
    "`when` is 0, and this fit resumed from nothing",
    "pass a later `when`, such as 8 or 0.4; or load the weights first, or ignore this warning for weights "
    "that are trained all the same",
)
_FEW = 0.01  # of the parameters; a ratio of 0.9 leaves about this


def little_left(after: int, dense: int) -> str:
    """Return what to say when a prune leaves so few of the parameters, or nothing.

    >>> little_left(50, 100)
    ''
    """
    if after >= _FEW * dense:
        return ""
    return explain(
        "StructuredPruning leaves almost nothing of the network",
        f"{after:,} of {dense:,} parameters, {after / dense:.2%}",
        "check `ratio`: it is the share of channels to remove, and parameters fall with its square; or ask "
        "for `target=Params(0.5)`",
    )


@torch.no_grad()
def looks_untrained(model: nn.Module) -> bool:
    """Return whether everything that tells is as torch initialises it; `False` where nothing tells.

    >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> looks_untrained(net), looks_untrained(net(torch.randn(8, 4)) is None or net)
    (True, False)
    """
    modules = list(model.modules())
    if any(int(count) > 0 for count in _counters(modules)):
        return False
    norms = list(_norm_weights(modules))
    if norms:
        return all(bool((weight == weight.flatten()[0]).all()) for weight in norms)
    layers = [m for m in modules if isinstance(m, (nn.Linear, _ConvNd)) and m.weight.numel()]
    return bool(layers) and all(_within_bounds(layer.weight) for layer in layers)


def _counters(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None:
            yield module.num_batches_tracked


def _norm_weights(modules: list[nn.Module]) -> Iterator[Tensor]:
    for module in modules:
        if "Norm" in type(module).__name__:
            for tensor in module.parameters(recurse=False):
                if tensor.numel() > 1 and not tensor.is_meta:
                    yield tensor


def _within_bounds(weight: Tensor) -> bool:
    fan_in = math.prod(weight.shape[1:])
    return float(weight.abs().max()) <= 1.0001 / math.sqrt(fan_in)
