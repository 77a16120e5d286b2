"""Which loss hangs on which output of the student."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_accel.surgery.call import tensors


def differentiable(output: Any) -> bool:
    """Tell whether any tensor in an output carries a gradient.

    >>> import torch
    >>> differentiable({"logits": torch.ones(1, requires_grad=True)}), differentiable(torch.ones(1))
    (True, False)
    """
    return any(tensor.requires_grad for tensor in tensors(output))


def depends_on(loss: Tensor | None, output: Any) -> bool:
    """Tell whether the graph of a loss reaches an output.

    >>> import torch
    >>> one, other = (torch.ones(1, requires_grad=True) * 2 for _ in range(2))
    >>> depends_on(one.sum(), one), depends_on(one.sum(), other)
    (True, False)
    """
    wanted = {t.grad_fn for t in tensors(output) if t.grad_fn is not None}
    seen: set[Any] = set()
    ahead = [None if loss is None else loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        if node in wanted:
            return True
        seen.add(node)
        ahead.extend(following for following, _ in node.next_functions)
    return False
