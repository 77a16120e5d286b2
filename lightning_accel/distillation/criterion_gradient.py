"""What the user's own loss asks of the student's outputs: its gradient there, which says what no criterion was heard to.

Outputs whose gradient sums to zero along a dimension stand behind a softmax over it, as a number that is added to all of
them changes nothing; those of a regression, or of several labels, do not. Positions at which there is no gradient are left out
of the loss, by whatever product, selection or clamp. No part of the network runs backward for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.distillation.criterion import CLASSES, LABELS, NUMBERS, Heard
from lightning_accel.exact import exact

NOTHING, OTHERS = "nothing", "others"
"""Of what no criterion was heard for: there is none, or it takes outputs for something else than classes."""

_HALF = (torch.float16, torch.bfloat16)
_UP = 2.0**16  # for gradients that 16 bits would round to zero; what becomes infinite is not zero


def gradient(
    loss: Tensor | None, place: Tensor | None, asked: Tensor | None = None
) -> Tensor | None:
    """Return the gradient of a loss at a tensor on its graph, which is kept; `None` where there is none.

    Args:
        loss: Of any shape with `asked`, else one number.
        place: The tensor.
        asked: The gradient at the loss; one by default.

    >>> outputs = torch.ones(1, 2, requires_grad=True) * 1.0
    >>> gradient((outputs * torch.tensor([1.0, 3.0])).sum(), outputs)
    tensor([[1., 3.]])
    """
    if loss is None or place is None or not (loss.requires_grad and place.requires_grad):
        return None
    if loss._backward_hooks or place._backward_hooks:  # the user's, who would see another backward
        return None
    if loss.numel() != 1 and (asked is None or asked.shape != loss.shape):
        return None
    given = torch.ones_like(loss) if asked is None else asked
    try:
        found = torch.autograd.grad(loss, place, given, retain_graph=True, allow_unused=True)[0]
    except RuntimeError:  # the user has let go of the graph
        return None
    return None if found is None else found.detach()


def unheard(loss: Tensor | None, outputs: Tensor, calls: Sequence[Heard]) -> Tensor | None:
    """Return the part of a loss's gradient that does not come through the criteria of labels and numbers.

    `None` where the loss asks nothing; zeros where they are all there is.
    """
    up = None if loss is None else _up(loss, outputs)
    whole = gradient(loss, outputs, up)
    if whole is None or not bool(whole.isfinite().all() & (whole != 0).any()):
        return None
    rest = whole.clone()
    for call in calls:
        if call.kind in (LABELS, NUMBERS) and call.judges:
            part = gradient(call.result, outputs, gradient(loss, call.result, up))
            rest = rest if part is None else rest - part
    little = 1e-3 * exact(whole).abs().sum()
    return rest if bool(exact(rest).abs().sum() > little) else torch.zeros_like(rest)


def takes(rest: Tensor | None, dim: int | None) -> str | None:
    """Return what a gradient takes outputs for: "nothing", "classes" along a dimension, "others"; `None` is unknown.

    >>> takes(torch.tensor([[0.5, -0.2, -0.3]]), 1), takes(torch.tensor([[0.5, 0.2, -0.3]]), 1)
    ('classes', 'others')
    """
    if rest is None:
        return None
    if not bool((rest != 0).any()):
        return NOTHING
    dims = range(1, rest.dim()) if dim is None else (dim,)
    if not any(_vanishes(rest, along) for along in dims):
        return OTHERS
    return None if dim is None else CLASSES


def class_dim_in(rest: Tensor | None) -> int | None:
    """Return the only dimension behind the first along which a gradient sums to zero."""
    if rest is None or not bool((rest != 0).any()):
        return None
    found = [dim for dim in range(1, rest.dim()) if _vanishes(rest, dim)]
    return found[0] if len(found) == 1 else None


def left_out(loss: Tensor | None, outputs: Tensor | None, dim: int) -> Tensor | None:
    """Return the positions (B, ...) of sequences or maps at which a loss asks nothing; `None` where nothing tells.

    Samples of which it asks nothing at all are not among them: what has no label may learn from a teacher.

    >>> outputs = torch.ones(1, 2, 3, requires_grad=True) * 1.0
    >>> left_out((outputs.log_softmax(-1)[..., 0] * torch.tensor([1.0, 0.0])).sum(), outputs, -1)
    tensor([[False,  True]])
    """
    found = None
    if outputs is not None and outputs.dim() > 2 and loss is not None and loss.numel() == 1:
        found = gradient(loss, outputs, _up(loss, outputs))
    if found is None:
        return None
    none = (found == 0).all(dim)
    whole = none.flatten(1).all(1)
    return none & ~whole.view(-1, *[1] * (none.dim() - 1))


def _up(loss: Tensor, outputs: Tensor) -> Tensor:
    return torch.full_like(loss, _UP if outputs.dtype in _HALF else 1.0)


def _vanishes(rest: Tensor, dim: int) -> bool:
    little, whole = 5e-3 if rest.dtype in _HALF else 1e-3, exact(rest)
    return bool(whole.sum(dim).abs().sum() <= little * whole.abs().sum())
