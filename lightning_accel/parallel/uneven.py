"""Weights that a step uses on some processes and not on others: experts without a token, layers skipped by chance.

FSDP2 sums the gradients that there are, so all processes must have the same ones; where they differ it fails, or waits
for ever. Here such weights get a gradient of zeros first. One that no process used has none in the end, as in one
process: zeros would decay it, and move it by old momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


class Uneven:
    """Stands around the backward passes of a sharded module.

    Args:
        model: The module, not gathered; the weights in question are gathered with the root.
        names: Those that not every step reads.
        group: The processes.
    """

    def __init__(self, model: Any, names: Sequence[str], group: Any) -> None:
        self._model, self._names, self._group = model, list(names), group
        self._shards = {name: model.get_parameter(name) for name in names}
        self._used: set[str] = set()
        self._hidden = False
        """Whether the graph has parts that are made only in backward (reentrant checkpoints)."""
        self._had: set[str] = set()
        """Those with a gradient already, from earlier batches."""

    def before_backward(self, loss: Tensor) -> Tensor:
        """Return the loss, with zeros as gradients for all weights in question."""
        if not loss.requires_grad:
            return loss
        self._had = {n for n, shard in self._shards.items() if shard.grad is not None}
        if any(isinstance(self._model.get_parameter(name), DTensor) for name in self._names):
            self._model.unshard()  # backward would do so next: a step that calls `forward` lets go of the root
        weights = {name: self._model.get_parameter(name) for name in self._names}
        given = {n: p for n, p in weights.items() if p.requires_grad}
        reached, self._hidden = _reached(loss)
        self._used |= {n for n, p in given.items() if id(p) in reached}
        return _Zeros.apply(loss, *given.values())

    def after_backward(self) -> None:
        """Take zeros away that no process had a use for; called when gradients have been summed."""
        if self._hidden:
            self._used |= {n for n, p in self._shards.items() if _is_some(p.grad)}
        used = torch.tensor([n in self._used for n in self._names], dtype=torch.int32)
        used = used.to(next(iter(self._shards.values())).device)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=self._group)
        for (name, shard), anywhere in zip(self._shards.items(), used.tolist(), strict=True):
            if not anywhere and name not in self._had:
                shard.grad = None
        self._used.clear()


class _Zeros(torch.autograd.Function):
    """The loss, which seems to depend on weights."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*weights)
        return loss.clone()  # of a view FSDP2 would warn the user

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, *(torch.zeros_like(weight) for weight in ctx.saved_tensors)


def _is_some(grad: Tensor | None) -> bool:
    local = grad.to_local() if isinstance(grad, DTensor) else grad
    return local is not None and bool(local.count_nonzero())


def _reached(loss: Tensor) -> tuple[set[int], bool]:
    """Return the ids of the leaves that backward will come to, and whether there may be others."""
    hidden = False
    found, seen, ahead = set[int](), set[Any](), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        hidden = hidden or node.name().startswith("CheckpointFunction")
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        ahead += [following for following, _ in node.next_functions]
    return found, hidden
