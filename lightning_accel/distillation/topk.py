"""The teacher's k largest logits and one bucket for all the others, and the same of the student.

Keeping the k largest logits alone and normalising them again teaches a student that all other classes
are impossible: its gradient is not zero where student and teacher agree (the bias that Anshumann et
al. 2025 measure, arXiv 2503.16870). Here the others stay together as one bucket that holds their mass,
T * logsumexp(rest / T), so that softmax over the k + 1 buckets at temperature T gives each of the k
classes exactly its probability among all C. Then KL over the buckets has the full loss' gradient
T * (q - p) for each of the k logits, is zero where student equals teacher, and leaves free only how
the student spreads the tail. Shapes: ... any, C classes, k kept ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_accel.errors import explain


def compress(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the k largest logits with the tail as the last one, (..., k+1), and their classes (..., k).

    Args:
        logits: Of shape (..., C); half precision is computed in float32.
        k: Classes to keep, at least 1 and less than C.
        temperature: The one at which the loss will compare; the tail is exact at this one alone.

    Raises:
        ValueError: `k` or `temperature` is out of range.

    >>> buckets, ids = compress(torch.tensor([[1.0, 4.0, 2.0, 1.0]]), k=2)
    >>> ids.tolist(), buckets[0, :2].tolist(), round(float(buckets[0, 2]), 4)
    ([[1, 2]], [4.0, 2.0], 1.6931)
    """
    classes = logits.shape[-1] if logits.dim() else 0
    if not 1 <= k < classes:
        raise ValueError(
            explain(
                "`k` must be at least 1 and less than the number of classes",
                f"k={k}, {classes} classes",
                "keep fewer classes, or all logits without top-k",
            )
        )
    ids = logits.topk(k, dim=-1).indices
    return coarsen(logits, ids, temperature), ids


def coarsen(student_logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the logits (..., C) at `ids` (..., k) and the tail of the others, together (..., k+1).

    Args:
        student_logits: Of shape (..., C); half precision is computed in float32.
        ids: Classes to keep, of shape (..., k), k less than C.
        temperature: The one at which the loss will compare.

    Raises:
        ValueError: The shapes do not fit together, or `temperature` is not positive.

    >>> coarsen(torch.tensor([0.0, 3.0, 0.0]), torch.tensor([1])).round(decimals=4)
    tensor([3.0000, 0.6931])
    """
    if not temperature > 0:
        raise ValueError(explain("`temperature` must be positive", f"{temperature}", "pass 1.0"))
    if student_logits.shape[:-1] != ids.shape[:-1] or ids.shape[-1] >= student_logits.shape[-1]:
        raise ValueError(
            explain(
                "`ids` must name fewer classes than there are, for the same rows",
                f"logits {tuple(student_logits.shape)}, ids {tuple(ids.shape)}",
                "hand over the logits of the rows that the ids were made for",
            )
        )
    logits = student_logits
    logits = logits.float() if logits.element_size() < 4 else logits
    rest = logits.scatter(-1, ids, -torch.inf)
    tail = temperature * (rest / temperature).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, ids), tail], dim=-1)
