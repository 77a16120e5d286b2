"""Layers on the grids of integers: in training, after it, and as what integer kernels compute."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily
from lightning_accel.quantization.lower import lowered
from lightning_accel.quantization.post_training import quantize, unquantize
from lightning_accel.quantization.state import quantization_of
from lightning_accel.quantization.sums import quantize_sums

if TYPE_CHECKING:
    from lightning_accel.quantization.callbacks.post_training_quantization import (
        PostTrainingQuantization,
    )
    from lightning_accel.quantization.callbacks.quantization_aware_training import (
        QuantizationAwareTraining,
    )

__all__ = [
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "lowered",
    "quantization_of",
    "quantize",
    "quantize_sums",
    "unquantize",
]

__getattr__ = lazily(
    __name__,
    {
        "PostTrainingQuantization": "callbacks.post_training_quantization",
        "QuantizationAwareTraining": "callbacks.quantization_aware_training",
    },
)
