"""Losses on features: what a layer of the teacher computes.

Shapes: B batch, C channels, H W space, S space flattened. Widths and layouts are brought together before,
by projectors; `attention_transfer` alone needs no equal channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_accel.arguments import one_of
from lightning_accel.distillation.losses.full_precision import (
    average,
    blank,
    full_precision,
    require_same_shape,
    unit,
    valid_positions,
)
from lightning_accel.errors import explain

Form = Literal["code", "paper"]
FORMS = get_args(Form)
_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


@full_precision()
def fitnet(student: Tensor, teacher: Tensor, /, *, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared difference of all elements.

    Romero et al., 2014, arXiv 1412.6550.

    Args:
        student: Features (..., D), projected to the teacher's width.
        teacher: Features of the same shape.
        mask: True where a position (...), all dimensions but the last, counts; none at all gives 0.

    Raises:
        ValueError: Shapes differ.

    >>> fitnet(torch.zeros(2, 3), torch.full((2, 3), 2.0))
    tensor(4.)
    """
    require_same_shape(student, teacher, "project the student's features to the teacher's shape")
    valid = valid_positions(student, mask)
    if valid is None:
        return average((student - teacher).square(), None)
    return average((blank(student, valid) - blank(teacher, valid)).square().mean(-1), valid)


@full_precision()
def attention_transfer(
    student_BCHW: Tensor, teacher_BCHW: Tensor, /, *, form: Form = "code"
) -> Tensor:
    """Return how differently two layers spread their activity over space.

    Zagoruyko and Komodakis, 2016, arXiv 1612.03928. The map of a sample is the mean over channels of the
    squares, at length 1. Its larger side is average-pooled to the smaller one; channels may differ.

    Args:
        student_BCHW: Features with one to three dimensions of space.
        teacher_BCHW: Features of as many samples and dimensions.
        form: "code", the mean of squared differences, which published weights such as 1000 belong to;
            or "paper", the length of the difference, averaged over samples.

    Raises:
        ValueError: Batches or numbers of dimensions differ, or the form is unknown.

    >>> features = torch.rand(2, 4, 6, 6)
    >>> attention_transfer(features, 3 * features).round(decimals=6)
    tensor(0.)
    """
    one_of("form", form, FORMS)
    _require_maps(student_BCHW, teacher_BCHW)
    sides = zip(student_BCHW.shape[2:], teacher_BCHW.shape[2:], strict=True)
    size = tuple(min(pair) for pair in sides)
    gap_BS = _attention(student_BCHW, size) - _attention(teacher_BCHW, size)
    if form == "code":
        return average(gap_BS.square(), None)
    return average(torch.linalg.vector_norm(gap_BS, dim=1), None)


def _require_maps(student: Tensor, teacher: Tensor) -> None:
    fits = student.dim() == teacher.dim() and student.dim() - 2 in _POOL
    if not fits or len(student) != len(teacher):
        raise ValueError(
            explain(
                "attention transfer compares (B, C, H, W), (B, C, L) or (B, C, D, H, W) of one batch",
                f"{tuple(student.shape)} and {tuple(teacher.shape)}",
                "pick layers with features of the same kind",
            )
        )


def _attention(features: Tensor, size: tuple[int, ...]) -> Tensor:
    largest = features.detach().abs().flatten(1).amax(1).clamp(min=1e-20)
    scaled = features / largest.view(
        -1, *[1] * (features.dim() - 1)
    )  # squares neither over- nor underflow
    map_B1HW = scaled.square().mean(1, keepdim=True)
    if map_B1HW.shape[2:] != size:
        map_B1HW = _POOL[len(size)](map_B1HW, size)
    return unit(map_B1HW.flatten(1))
