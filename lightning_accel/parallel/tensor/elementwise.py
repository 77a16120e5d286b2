"""Whether an optimizer steps each number by itself, so that parts of a weight step as the whole does."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_accel.errors import Unsupported

_STEPS = 3


def require_elementwise(optimizer: Optimizer) -> None:
    """Try an optimizer on weights, and on each of their halves alone, by rows and by columns, three steps each.

    Raises:
        Unsupported: The halves go elsewhere: it uses norms or factors of whole weights (LAMB, LARS, Adafactor, Muon).
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_STEPS + 1, 8, 4, 3, 3, generator=generator, dtype=torch.float64)
    for group in optimizer.param_groups:
        try:
            apart = [
                not torch.allclose(
                    _stepped(optimizer, group, weights),
                    torch.cat(
                        [_stepped(optimizer, group, half) for half in weights.chunk(2, dim)],
                        dim - 1,
                    ),
                    rtol=1e-9,
                )
                for weights in (drawn, drawn[..., 0, 0])
                for dim in (1, 2)
            ]
            found = "they differ" if any(apart) else ""
        except Exception as error:  # of a step that wants a closure, or weights of its own kind
            found = f"{type(error).__name__}: {error}"
        if found:
            raise Unsupported(
                "in tensor parallelism an optimizer must step each number by itself",
                f"steps of {type(optimizer).__name__} on a weight and on its halves: {found}",
                "use SGD, Adam, AdamW or another elementwise one, or `accel_fsdp`",
            )


@torch.no_grad()
def _stepped(optimizer: Optimizer, group: dict[str, Any], tensors: torch.Tensor) -> torch.Tensor:
    """Return the first tensor after steps with the others as gradients."""
    weight = nn.Parameter(tensors[0].clone())
    alone, step = with_weight(optimizer, {**group, "lr": 0.1}, weight)
    for gradient in tensors[1:]:
        weight.grad = gradient.clone()
        step(alone)
    return weight.detach()


def with_weight(
    optimizer: Optimizer, group: dict[str, Any], weight: nn.Parameter
) -> tuple[Any, Any]:
    """Return a copy of an optimizer with one weight and no state, and its step without hooks."""
    alone = copy.copy(optimizer)
    settings = {**group, "params": [weight], "fused": None, "capturable": False}
    vars(alone).update(state=defaultdict(dict), param_groups=[settings])
    return alone, torch.no_grad()(inspect.unwrap(type(optimizer).step))
