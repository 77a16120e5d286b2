"""Rounding up or down, learned for each layer (AdaRound, Nagel et al. 2020, arXiv:2004.10568).

Each weight becomes the integer below or above it. Which one is a number between 0 and 1 that gradients move so that the
layer's outputs change little, and that a penalty drives to 0 or 1 as it goes: f = 1 - |2h - 1|^b with b from 20 down to 2,
and h = clamp(1.2 sigmoid(v) - 0.1, 0, 1). The error of outputs is a quadratic form of X^T X, so each step sees all of the
calibration, and no sample is kept. How many steps there are depends on the size of the layer and on nothing else.

Names of tensors end in their dimensions: G groups of a layer, I inputs x kernel, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = (200, 1500)
"""The fewest, of the widest layers, and the most."""
_OPERATIONS = 4e11
"""Multiplications of a layer within which there are more than the fewest steps: some seconds of one core."""
_RATE, _PENALTY, _ALONE = 0.02, 5.0, 0.2
_STRETCH, _BELOW = 1.2, -0.1


def adaround(rows_GOI: Tensor, gram_GII: Tensor, scale_GOI: Tensor, top: int) -> Tensor:
    """Return the rows on their grid, each weight rounded up or down.

    Args:
        rows_GOI: Float64.
        gram_GII: X^T X.
        scale_GOI: Of each weight.
        top: The largest integer.

    >>> rows, gram = torch.tensor([[[0.4, 0.45]]]).double(), torch.ones(1, 2, 2).double()
    >>> adaround(rows, gram, torch.ones(1, 1, 2).double(), 7).sum()  # of equal inputs, one takes it all
    tensor(1., dtype=torch.float64)
    """
    whole = rows_GOI / scale_GOI
    low = whole.floor()
    share = (whole - low).clamp(0.01, 0.99).float()
    learned = torch.logit((share - _BELOW) / _STRETCH).requires_grad_()
    nearest = whole.round().clamp(-top, top) * scale_GOI
    usual = squared_errors(nearest - rows_GOI, gram_GII).sum().clamp_min(1e-30)
    gram, unit = (gram_GII / usual * share.numel()).float(), scale_GOI.float()
    optimizer = torch.optim.Adam([learned], _RATE)
    count = _count(rows_GOI)
    for step in range(count):
        with torch.enable_grad():
            part = (torch.sigmoid(learned) * _STRETCH + _BELOW).clamp(0, 1)
            made = (low.float() + part).clamp(-top, top)
            change = (made - whole.float()) * unit
            loss = squared_errors(change, gram).sum()
            done = (step / count - _ALONE) / (1 - _ALONE)
            if done > 0:
                sharpness = 2 + 18 * (1 - done)
                loss = loss + _PENALTY * (1 - (2 * part - 1).abs().pow(sharpness)).sum()
            (learned.grad,) = torch.autograd.grad(loss, learned)
        optimizer.step()
    up = (learned.detach() > 0).double()
    return (low + up).clamp(-top, top) * scale_GOI


def squared_errors(change_GOI: Tensor, gram_GII: Tensor) -> Tensor:
    """Return by how much each output changes, squared and summed over samples.

    >>> squared_errors(torch.tensor([[[1.0, 2.0]]]), torch.eye(2)[None])
    tensor([[5.]])
    """
    return ((change_GOI @ gram_GII) * change_GOI).sum(-1)


def _count(rows_GOI: Tensor) -> int:
    groups, outputs, inputs = rows_GOI.shape
    few, most = _STEPS
    return int(min(most, max(few, _OPERATIONS / (2.0 * groups * outputs * inputs**2))))
