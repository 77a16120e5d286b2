"""The independent truth about a cut: the dense network in which everything that is gone is zero, found by value."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lightning_accel.pruning import prune
from lightning_accel.surgery import Receipt


class Fn(nn.Module):
    """A forward, and the modules, parameters and plain attributes that it uses."""

    def __init__(self, forward: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.body = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.body(self, *args, **kwargs)


def masked(dense: nn.Module, small: nn.Module) -> nn.Module:
    """Zero, in place, each element of the dense network that the small one has not, found by value."""
    left = dict(small.named_parameters())
    with torch.no_grad():
        for name, tensor in dense.named_parameters():
            kept = torch.isin(tensor, left[name])
            assert int(kept.sum()) == left[name].numel(), name
            tensor.mul_(kept)
    return dense


def check(net: nn.Module, *inputs: Any, ratio: float = 0.5, example: Any = None) -> Receipt:
    """Prune, and compare with the dense network whose removed elements are zeros, on every input."""
    net = net.double()
    dense = copy.deepcopy(net)
    receipt = prune(net, example=inputs[0] if example is None else example, ratio=ratio)
    masked(dense, net)
    for given in inputs:
        given = given if isinstance(given, tuple) else (given,)
        with torch.no_grad():
            torch.testing.assert_close(
                net.eval()(*given), dense.eval()(*given), rtol=1e-9, atol=1e-9
            )
    return receipt
