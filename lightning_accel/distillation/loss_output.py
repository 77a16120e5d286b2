"""What one training step of a student gave: the total loss and its summands."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from lightning_accel.distillation.outputs import Outputs


class WeightedLoss(NamedTuple):
    """One summand: its weight and its value, unweighted."""

    weight: float
    value: Tensor


class LossOutput(NamedTuple):
    """The total loss of a step, its summands by name, and what the last call of the student gave."""

    total: Tensor
    parts: dict[str, WeightedLoss]
    outputs: Outputs | None
