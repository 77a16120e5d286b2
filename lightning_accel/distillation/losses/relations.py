"""Losses on relations: which samples the teacher finds alike.

Shapes: B batch, A anchors (a part of the batch), N negatives, D features. Widths of student and teacher may
differ, except in `crd`, whose embeddings are learned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_accel.arguments import finite, number
from lightning_accel.distillation.losses.full_precision import (
    average,
    full_precision,
    inner_products,
    require_same_shape,
    unit,
)
from lightning_accel.errors import explain

_MOST_ELEMENTS = 2**22  # of one tensor of angles: 32 MiB


@full_precision()
def rkd(
    student_BD: Tensor, teacher_BD: Tensor, /, *, alpha: float = 25.0, beta: float = 50.0
) -> Tensor:
    """Return alpha times the gap of distances plus beta times the gap of angles between samples.

    Park et al., 2019, arXiv 1904.05068. Distances are divided by the mean of those above zero; gaps are
    smooth L1, averaged over all pairs and all triples. Equal samples have no direction: angle 0 and no
    gradient. All come from the inner products, so that no width meets pairs or triples; above 161 samples
    the B^3 angles are taken in parts and computed again in backward.

    Args:
        student_BD: Features; dimensions after the first are flattened.
        teacher_BD: Features of the same samples.
        alpha: Weight of distances.
        beta: Weight of angles.

    Raises:
        ValueError: Batches differ.

    >>> points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> rkd(7 * points + 1, points).round(decimals=4)
    tensor(0.)
    """
    student_BD, teacher_BD = _rows(student_BD, teacher_BD)
    batch = len(student_BD)
    if not batch:
        return student_BD.sum()
    taught, told = _distances(student_BD), _distances(teacher_BD)
    by_distance = F.smooth_l1_loss(_relative(taught[1]), _relative(told[1]))
    return (alpha * by_distance + beta * _angles(taught, told) / batch**3).to(student_BD.dtype)


@full_precision()
def similarity_preserving(student: Tensor, teacher: Tensor, /) -> Tensor:
    """Return the squared gap of both sides' similarities between samples, divided by B^2.

    Tung and Mori, 2019, arXiv 1907.09682. Similarities are inner products of flattened features, each
    row at length 1.

    Args:
        student: Features (B, ...).
        teacher: Features of the same samples.

    Raises:
        ValueError: Batches differ.

    >>> features = torch.eye(2)
    >>> similarity_preserving(5 * features, features), similarity_preserving(torch.ones(2, 3), features)
    (tensor(0.), tensor(0.2929))
    """
    student_BD, teacher_BD = _rows(student, teacher)
    return average((_similarity(student_BD) - _similarity(teacher_BD)).square(), None)


@full_precision(teacher_learns=True)
def crd(
    student_BD: Tensor,
    teacher_BD: Tensor,
    /,
    *,
    temperature: float = 0.07,
    target: Tensor | None = None,
    negatives: Tensor | None = None,
    negatives_target: Tensor | None = None,
    num_data: int | None = None,
) -> Tensor:
    """Return the contrastive loss that tells a sample's pair of embeddings from pairs of two samples.

    -log h(pair) - sum over N negatives of log(1 - h), with h = e^x / (e^x + N/M) and x the cosine divided
    by the temperature, averaged over samples. Tian, Krishnan and Isola, 2019, arXiv 1910.10699. Negatives
    are the other rows of the batch, from the student's and from the teacher's side, averaged; or a memory.
    A sample without negatives costs nothing. The teacher's gradient is kept: its embedding is learned.

    Args:
        student_BD: Embeddings.
        teacher_BD: Embeddings of the same shape.
        temperature: What cosines are divided by.
        target: Labels (B,); samples of one class are no negatives of each other.
        negatives: A memory (N, D) of teacher embeddings, used in place of the batch.
        negatives_target: The memory's labels (N,), to go with `target`.
        num_data: M, samples in the data set; `None` takes N + 1.

    Raises:
        ValueError: Shapes do not fit, labels are missing on one side, or the temperature or `num_data` is
            not above zero.

    >>> crd(torch.eye(2), torch.eye(2), temperature=1.0)
    tensor(1.2675)
    """
    finite("temperature", temperature, above=0.0)
    _require_embeddings(student_BD, teacher_BD, negatives)
    _require_labels(student_BD, target, negatives, negatives_target)
    number("num_data", num_data, least=1, none=True, do="pass the length of the data set")
    student_BD, teacher_BD = unit(student_BD), unit(teacher_BD)
    pairs_B = (student_BD * teacher_BD).sum(1) / temperature
    if negatives is not None:
        apart_BN = _apart(target, negatives_target, (len(student_BD), len(negatives)), student_BD)
        scores_BN = inner_products(student_BD, unit(negatives)).to(pairs_B.dtype) / temperature
        return _nce(pairs_B, scores_BN, apart_BN, num_data)
    scores_BB = inner_products(student_BD, teacher_BD).to(pairs_B.dtype) / temperature
    apart_BB = _apart(target, target, (len(student_BD), len(student_BD)), student_BD)
    apart_BB = apart_BB & ~torch.eye(len(student_BD), dtype=torch.bool, device=student_BD.device)
    both = (_nce(pairs_B, scores, apart_BB, num_data) for scores in (scores_BB, scores_BB.T))
    return sum(both, start=pairs_B.new_zeros(())) / 2


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() < 2 or teacher.dim() < 2 or len(student) != len(teacher):
        raise ValueError(
            explain(
                "relations are between the samples of one batch",
                f"{tuple(student.shape)} and {tuple(teacher.shape)}",
                "pass features (B, ...) of the same samples",
            )
        )
    return student.flatten(1), teacher.flatten(1)


def _distances(rows_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return inner products of the centred rows and distances, zero where rounding makes them."""
    centred_BD = rows_BD - rows_BD.mean(0)
    products_BB = inner_products(centred_BD, centred_BD)
    squares_B = products_BB.diagonal()
    sums_BB = squares_B[:, None] + squares_B
    squared_BB = sums_BB - 2 * products_BB
    apart = ~(squared_BB <= 1e3 * torch.finfo(squared_BB.dtype).eps * sums_BB)  # NaN stays NaN
    one, zero = squared_BB.new_ones(()), squared_BB.new_zeros(())
    return products_BB, squared_BB.where(apart, one).sqrt().where(apart, zero)


def _relative(distances_BB: Tensor) -> Tensor:
    mean = distances_BB.sum() / (distances_BB > 0).sum().clamp(min=1)
    return distances_BB / mean.where(mean != 0, mean.new_ones(()))


def _angles(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    batch = len(student[0])
    anchors = max(1, _MOST_ELEMENTS // batch**2)
    if anchors >= batch:
        return _angle_gap(student, teacher, (0, batch))
    gaps = [
        checkpoint(
            _angle_gap,
            student,
            teacher,
            (first, min(first + anchors, batch)),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for first in range(0, batch, anchors)
    ]
    return torch.stack(gaps).sum()


def _angle_gap(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], part: tuple[int, int]
) -> Tensor:
    """Return the sum of smooth L1 gaps of the angles at some anchors."""
    cosines = _cosines(*student, slice(*part)), _cosines(*teacher, slice(*part))
    return F.smooth_l1_loss(*cosines, reduction="sum")


def _cosines(products_BB: Tensor, distances_BB: Tensor, part: slice) -> Tensor:
    """Return cosines (A, B, B) of the angle that two samples make at an anchor."""
    apart = distances_BB != 0
    inverse_BB = distances_BB.where(apart, distances_BB.new_ones(())).reciprocal() * apart
    to_anchor_AB, anchor_A = products_BB[part], products_BB.diagonal()[part]
    between_ABB = products_BB - to_anchor_AB[:, :, None] - to_anchor_AB[:, None, :]
    between_ABB = between_ABB + anchor_A[:, None, None]
    return between_ABB * inverse_BB[part, :, None] * inverse_BB[part, None, :]


def _similarity(rows_BD: Tensor) -> Tensor:
    return unit(inner_products(rows_BD, rows_BD)).to(rows_BD.dtype)


def _require_embeddings(student: Tensor, teacher: Tensor, negatives: Tensor | None) -> None:
    require_same_shape(student, teacher, "embed both in the same number of dimensions")
    if student.dim() != 2:
        found = str(tuple(student.shape))
        raise ValueError(
            explain("crd compares embeddings (B, D)", found, "embed each sample as a vector")
        )
    if negatives is not None and (negatives.dim() != 2 or negatives.shape[1] != student.shape[1]):
        raise ValueError(
            explain(
                "`negatives` are embeddings (N, D) as wide as the student's",
                f"{tuple(negatives.shape)} for {tuple(student.shape)}",
                "keep the teacher's embeddings",
            )
        )


def _require_labels(
    student_BD: Tensor,
    target: Tensor | None,
    negatives: Tensor | None,
    negatives_target: Tensor | None,
) -> None:
    wanted = {"target": (target, student_BD), "negatives_target": (negatives_target, negatives)}
    for name, (labels, rows) in wanted.items():
        if labels is not None and (rows is None or labels.shape != rows.shape[:1]):
            found = f"{tuple(labels.shape)} for {None if rows is None else tuple(rows.shape)}"
            raise ValueError(explain(f"`{name}` has one label per embedding", found))
    if negatives is not None and (target is None) != (negatives_target is None):
        missing = "target" if target is None else "negatives_target"
        raise ValueError(
            explain(
                "labels tell which negatives are of the sample's class, so both sides need them",
                f"no `{missing}`",
                f"pass `{missing}` as well, or neither",
            )
        )


def _apart(
    own: Tensor | None, others: Tensor | None, shape: tuple[int, int], like: Tensor
) -> Tensor:
    if own is None or others is None:
        return torch.ones(shape, dtype=torch.bool, device=like.device)
    return own.to(like.device)[:, None] != others.to(like.device)[None]


def _nce(pairs_B: Tensor, scores_BN: Tensor, apart_BN: Tensor, num_data: int | None) -> Tensor:
    """Return the loss of each row's pair against its negatives, with h = sigmoid(x - log(N/M))."""
    count_B = apart_BN.sum(1)
    negatives_B = count_B.clamp(min=1).to(pairs_B.dtype)
    shift_B = (negatives_B / (negatives_B + 1 if num_data is None else num_data)).log()
    pair_B = F.softplus(shift_B - pairs_B)
    others_BN = F.softplus(scores_BN - shift_B[:, None]).where(apart_BN, pairs_B.new_zeros(()))
    return average((pair_B + others_BN.sum(1)).where(count_B > 0, pairs_B.new_zeros(())), None)
