"""What a student is asked to take over from a teacher: losses as pure functions.

Each takes student and teacher first, is computed in 32 bits outside of autocast and returns a scalar.

>>> import torch
>>> from lightning_accel.distillation.losses import kd
>>> float(kd(torch.zeros(2, 3), torch.zeros(2, 3)))
0.0
"""

from __future__ import annotations

from lightning_accel.distillation.losses.features import attention_transfer, fitnet
from lightning_accel.distillation.losses.logits import dist, dkd, jsd, kd, logit_standardized_kd
from lightning_accel.distillation.losses.outputs import bce, mse
from lightning_accel.distillation.losses.relations import crd, rkd, similarity_preserving

__all__ = [
    "attention_transfer",
    "bce",
    "crd",
    "dist",
    "dkd",
    "fitnet",
    "jsd",
    "kd",
    "logit_standardized_kd",
    "mse",
    "rkd",
    "similarity_preserving",
]
