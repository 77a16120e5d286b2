"""Masks in training: chosen single weights stay zero, through every step, prune and resume."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.pruning.mask.callback import WeightMasks

__all__ = ["WeightMasks"]


__getattr__ = lazily(__name__, {"WeightMasks": "callback"})
