"""Losses on logits: what the teacher thinks of every class.

Shapes: `...` any leading dimensions (B, or B and T), C classes, N rows. Everything stays in log space, as
log(softmax) is minus infinity from differences of some hundred on, and its gradient NaN. A class that both
sides rule out by a logit of minus infinity costs nothing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_accel.arguments import finite, share
from lightning_accel.distillation.losses.full_precision import (
    average,
    blank,
    full_precision,
    require_same_shape,
    unit,
    valid_positions,
)
from lightning_accel.errors import explain

_SAME_CLASSES = "give both the same classes in the same order"
_LOWEST = -1e30  # as good as minus infinity, and with a difference


@full_precision()
def kd(
    student: Tensor, teacher: Tensor, /, *, temperature: float = 4.0, mask: Tensor | None = None
) -> Tensor:
    """Return T^2 KL(teacher || student) of the softened classes, averaged over positions.

    Hinton, Vinyals and Dean, 2015, arXiv 1503.02531. T^2 keeps gradients of one size at any temperature.

    Args:
        student: Logits (..., C).
        teacher: Logits of the same shape.
        temperature: What both are divided by.
        mask: True where a position (...) counts; none at all gives 0.

    Raises:
        ValueError: Shapes differ, or the temperature is not above zero.

    >>> kd(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]), temperature=1.0)
    tensor(0.4338)
    """
    valid = _checked(student, teacher, temperature, mask)
    return _softened_kl(blank(student, valid), blank(teacher, valid), temperature, valid)


@full_precision()
def logit_standardized_kd(
    student: Tensor, teacher: Tensor, /, *, temperature: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    """Return `kd` of logits brought to mean 0 and standard deviation 1 in every row.

    Sun et al., 2024, arXiv 2403.01427: the student need not have the teacher's shift and scale. A row
    whose logits are all equal, as of a head that starts at zero, becomes zeros without a gradient.

    Args:
        student: Logits (..., C).
        teacher: Logits of the same shape.
        temperature: What the standardized logits are divided by.
        mask: True where a position (...) counts; none at all gives 0.

    Raises:
        ValueError: Shapes differ, the temperature is not above zero, or C < 2.

    >>> logits = torch.tensor([[1.0, 2.0, 4.0]])
    >>> logit_standardized_kd(logits, 10 * logits + 3).round(decimals=6)
    tensor(0.)
    """
    valid = _checked(student, teacher, temperature, mask)
    _require_classes(student, 2, "deviation needs two classes", "use `fitnet` on a single output")
    standard = _standardized(blank(student, valid)), _standardized(blank(teacher, valid))
    return _softened_kl(*standard, temperature, valid)


@full_precision()
def dkd(
    student: Tensor,
    teacher: Tensor,
    /,
    *,
    target: Tensor,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return `kd` taken apart: alpha times target against the rest, beta times the rest among itself.

    Zhao et al., 2022, arXiv 2203.08679. Reading the labels to check them waits for the device once.

    Args:
        student: Logits (..., C).
        teacher: Logits of the same shape.
        target: Integer labels (...) in [0, C); those at masked positions are not read.
        alpha: Weight of T^2 KL of target against the rest.
        beta: Weight of T^2 KL among the other classes.
        temperature: What both are divided by.
        mask: True where a position (...) counts; none at all gives 0.

    Raises:
        ValueError: Shapes differ, C < 3, labels outside, or the temperature is not above zero.
        TypeError: Labels are no integers.

    >>> logits = torch.tensor([[1.0, 2.0, 4.0]])
    >>> dkd(logits, logits.flip(-1), target=torch.tensor([0]), temperature=1.0)
    tensor(10.3028)
    """
    valid = _checked(student, teacher, temperature, mask)
    _require_classes(student, 3, "dkd compares classes other than the target", "use `kd`")
    index = _labels(target, student, valid).unsqueeze(-1)
    split_s = _split(blank(student, valid) / temperature, index)
    split_t = _split(blank(teacher, valid) / temperature, index)
    target_kl, rest_kl = (_kl(t, s) for s, t in zip(split_s, split_t, strict=True))
    return temperature**2 * average(alpha * target_kl + beta * rest_kl, valid)


@full_precision()
def dist(
    student: Tensor,
    teacher: Tensor,
    /,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return how far the student's probabilities are from correlating with the teacher's.

    T^2 (beta (1 - corr within rows) + gamma (1 - corr within classes)), Pearson's, averaged. Huang et al.,
    2022, arXiv 2205.10536. A row or class without any spread counts as correlation 0 and has no
    gradient; the correlation has no small constant in it, so that rare classes count in full. The second
    term is a statistic of the batch, under data parallelism of each rank's own.

    Args:
        student: Logits (..., C); all positions are rows.
        teacher: Logits of the same shape.
        beta: Weight of the correlation between the classes of a row.
        gamma: Weight of the correlation between the rows of a class; 0 where one row is left by `mask`.
        temperature: What both are divided by.
        mask: True where a position (...) counts; none at all gives 0.

    Raises:
        ValueError: Shapes differ, fewer than two rows, or the temperature is not above zero.

    >>> logits = torch.tensor([[1.0, 2.0, 4.0], [2.0, 1.0, 0.0]])
    >>> dist(logits, logits).abs().round(decimals=6), dist(logits, -logits) > 2
    (tensor(0.), tensor(True))
    """
    valid = _checked(student, teacher, temperature, mask)
    rows = math.prod(student.shape[:-1])
    if rows < 2:
        raise ValueError(
            explain(
                "dist correlates the rows of a batch and needs two",
                f"{rows} in {tuple(student.shape)}",
                "drop the last, smaller batch (drop_last=True) or use `kd`",
            )
        )
    student_NC, teacher_NC = (
        (blank(logits, valid) / temperature).softmax(-1).flatten(0, -2)
        for logits in (student, teacher)
    )
    valid = torch.ones_like(student_NC[:, 0], dtype=torch.bool) if valid is None else valid.ravel()
    every_class = torch.ones_like(student_NC[0], dtype=torch.bool)
    inter = average(1 - _correlation(student_NC, teacher_NC, every_class), valid)
    intra = (1 - _correlation(student_NC.T, teacher_NC.T, valid)).mean()
    return temperature**2 * (beta * inter + gamma * intra * (valid.sum() > 1))


@full_precision()
def jsd(
    student: Tensor,
    teacher: Tensor,
    /,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the generalised Jensen-Shannon divergence, averaged over positions.

    beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student; 0 stands
    for KL(teacher || student) and 1 for KL(student || teacher). Agarwal et al., 2023, arXiv 2306.13649.
    No T^2, as in the paper.

    Args:
        student: Logits (..., C).
        teacher: Logits of the same shape.
        beta: From 0, cover all that the teacher does, to 1, do nothing that it does not.
        temperature: What both are divided by.
        mask: True where a position (...) counts; none at all gives 0.

    Raises:
        ValueError: Shapes differ, beta lies outside [0, 1], or the temperature is not above zero.

    >>> round(float(jsd(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))), 4)  # log 2 at most
    0.6931
    """
    valid = _checked(student, teacher, temperature, mask)
    share("beta", beta)
    log_s = F.log_softmax(blank(student, valid) / temperature, dim=-1)
    log_t = F.log_softmax(blank(teacher, valid) / temperature, dim=-1)
    if beta == 0:
        return average(_kl(log_t, log_s), valid)
    if beta == 1:
        return average(_kl(log_s, log_t), valid)
    log_s, log_t = log_s.clamp(min=_LOWEST), log_t.clamp(min=_LOWEST)
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    return average(beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m), valid)


def _checked(
    student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None
) -> Tensor | None:
    finite("temperature", temperature, above=0.0)
    require_same_shape(student, teacher, _SAME_CLASSES)
    if student.dim() < 2:
        raise ValueError(
            explain(
                "logits have classes last and at least one dimension before",
                str(tuple(student.shape)),
                "add a batch dimension",
            )
        )
    return valid_positions(student, mask)


def _require_classes(logits: Tensor, least: int, what: str, do: str) -> None:
    if logits.shape[-1] < least:
        raise ValueError(explain(what, f"{logits.shape[-1]} classes", do))


def _softened_kl(s: Tensor, t: Tensor, temperature: float, valid: Tensor | None) -> Tensor:
    log_q = F.log_softmax(s / temperature, dim=-1)
    log_p = F.log_softmax(t / temperature, dim=-1)
    return temperature**2 * average(_kl(log_p, log_q), valid)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) over the last dimension; where p is zero, nothing is added or sent back."""
    ratio = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)
    return (log_p.exp() * ratio).sum(-1)


def _standardized(logits: Tensor) -> Tensor:
    centred = logits - logits.mean(dim=-1, keepdim=True)
    spread = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / (logits.shape[-1] - 1) ** 0.5
    largest = logits.detach().abs().amax(dim=-1, keepdim=True)
    varied = ~(spread <= 8 * torch.finfo(logits.dtype).eps * largest)  # NaN stays NaN
    zero = logits.new_zeros(())
    scale = spread.where(varied, zero + 1) + 1e-7
    return (centred / scale).where(varied, zero)


def _labels(target: Tensor, logits: Tensor, valid: Tensor | None) -> Tensor:
    if (
        target is None
        or target.is_floating_point()
        or target.is_complex()
        or target.dtype == torch.bool
    ):
        raise TypeError(
            explain(
                "`target` holds one integer label per position",
                "None" if target is None else f"{target.dtype}",
                "pass labels, or use `kd`, which needs none, where labels are mixed",
            )
        )
    if target.shape != logits.shape[:-1]:
        raise ValueError(
            explain(
                "`target` has one label per position",
                f"{tuple(target.shape)} for logits {tuple(logits.shape)}",
                f"pass labels of shape {tuple(logits.shape[:-1])}",
            )
        )
    labels = target.to(logits.device).long()
    if valid is not None:
        labels = labels.where(valid, 0)
    if not torch.compiler.is_compiling():
        _require_labels_inside(labels, logits.shape[-1])
    return labels


def _require_labels_inside(labels: Tensor, classes: int) -> None:
    outside = (labels < 0) | (labels >= classes)
    if bool(outside.any()):
        raise ValueError(
            explain(
                f"labels lie in [0, {classes}) where they count",
                f"{labels[outside][0].item()} in `target`",
                "mask positions without a label",
            )
        )


def _split(logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of (target, rest), and of the other classes among themselves."""
    rest = logits.scatter(-1, index, -math.inf)
    pair = torch.cat([logits.gather(-1, index), rest.logsumexp(-1, keepdim=True)], dim=-1)
    return F.log_softmax(pair, dim=-1), F.log_softmax(rest, dim=-1)


def _correlation(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """Return Pearson's correlation of the rows of two matrices over the valid columns."""
    return (_centred_unit(x, valid) * _centred_unit(y, valid)).sum(-1)


def _centred_unit(rows: Tensor, valid: Tensor) -> Tensor:
    """Return rows minus their mean at length 1; first scaled to a maximum of 1, which changes nothing."""
    largest = rows.detach().amax(-1, keepdim=True)
    rows = rows / largest.clamp(min=1e-20)  # squares of tiny probabilities would be zero
    count = valid.sum().clamp(min=1)
    centred = (rows - (rows * valid).sum(-1, keepdim=True) / count) * valid
    return unit(centred, 4 * torch.finfo(rows.dtype).eps * rows.shape[-1] ** 0.5)
