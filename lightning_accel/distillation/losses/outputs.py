"""Losses on outputs that are no classes: labels of which any number may be true, and numbers.

Shapes: `...` any leading dimensions (B, or B and positions), L labels, D numbers.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_accel.arguments import finite
from lightning_accel.distillation.losses.full_precision import (
    average,
    blank,
    full_precision,
    require_same_shape,
    valid_positions,
)


@full_precision()
def bce(
    student: Tensor, teacher: Tensor, /, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Return T^2 times the binary cross entropy with the teacher's softened labels, less its own entropy.

    Each label is a question of its own, so that shifting all logits of a row matters, as it does not in `kd`.
    The gradient is that of `F.binary_cross_entropy_with_logits`; where both agree, the value is 0.

    Args:
        student: Logits (..., L).
        teacher: Logits of the same shape.
        temperature: What both are divided by.
        mask: True where a position (...) counts; none at all gives 0.

    Raises:
        ValueError: Shapes differ, or the temperature is not above zero.

    >>> bce(Tensor([[0.0]]), Tensor([[100.0]]))  # log 2
    tensor(0.6931)
    """
    finite("temperature", temperature, above=0.0)
    s, t, valid = _checked(student, teacher, mask)
    s, t = s / temperature, t / temperature
    p = t.sigmoid()
    cross, own = (F.binary_cross_entropy_with_logits(x, p, reduction="none") for x in (s, t))
    return temperature**2 * average((cross - own).mean(-1), valid)


@full_precision()
def mse(student: Tensor, teacher: Tensor, /, *, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared gap of the outputs: of numbers, as in a regression, or of logits as they are.

    Args:
        student: Outputs (..., D).
        teacher: Outputs of the same shape.
        mask: True where a position (...) counts; none at all gives 0.

    Raises:
        ValueError: Shapes differ.

    >>> mse(Tensor([[1.0, 3.0]]), Tensor([[0.0, 0.0]]))
    tensor(5.)
    """
    s, t, valid = _checked(student, teacher, mask)
    return average((s - t).square().mean(-1), valid)


def _checked(
    student: Tensor, teacher: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    require_same_shape(student, teacher, "give both the same outputs in the same order")
    valid = valid_positions(student, mask)
    return blank(student, valid), blank(teacher, valid), valid
