"""Layers that another class computes for, as quantized ones, made plain for an edit that knows torch's own only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from lightning_accel.surgery.receipt import Receipt


@contextmanager
def plain_kinds(model: nn.Module) -> Iterator[list[Receipt]]:
    """Let modules and hooks that have a `leave_kind` be plain within; what is put into the list tells them what stays.

    >>> with plain_kinds(nn.Linear(2, 2)) as receipts:
    ...     receipts.append(Receipt())
    """
    receipts: list[Receipt] = []
    modules = [*model.modules()]
    hooks = [hook for module in modules for hook in module._forward_hooks.values()]
    back = [one.leave_kind() for one in (*modules, *hooks) if hasattr(one, "leave_kind")]
    try:
        yield receipts
    finally:
        kept = {id(moved.new): moved.kept for one in receipts for moved in one.moved}
        for put_back in back:
            put_back(kept)
