"""Whether losses on logits suit what student and teacher give: checked on the first batch, before it counts."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_accel.distillation.seen import IDS, LOGITS, Seen
from lightning_accel.distillation.term import Term
from lightning_accel.errors import AccelError


def check_logits(terms: Mapping[str, Term], seen: Seen) -> None:
    """Raise when a loss on logits would compare what is not there, or not comparable.

    Raises:
        AccelError: No logits, other shapes, or no telling which dimension holds the classes.
    """
    needed = {name: term for name, term in terms.items() if term.reads == LOGITS}
    if not needed:
        return
    _require_logits(next(iter(needed)), seen)
    of_classes = [name for name, term in needed.items() if term.of_classes]
    if of_classes:
        _require_class_dim(of_classes[0], seen)


def _require_logits(name: str, seen: Seen) -> None:
    student, teacher, ids = seen.logits, seen.answer.get(LOGITS), seen.answer.get(IDS)
    if student is None or teacher is None:
        raise AccelError(
            f"`{name}` needs logits",
            f"the {'student' if student is None else 'teacher'} returns no tensor, or several, of "
            f"shape (batch, ..., classes) within a {type(seen.record.output).__name__}",
            "name the layers that give them: logits='head: fc', or use losses on features",
        )
    shape = teacher.shape if ids is None else (*teacher.shape[:-1], student.shape[-1])
    if student.shape != torch.Size(shape):
        raise AccelError(
            "the logits of the student and the teacher do not match",
            f"{tuple(student.shape)} and {tuple(shape)}",
            "use a teacher with the same classes or vocabulary, `Teacher(classes=)` to pick "
            "them, or losses on features",
        )


def _require_class_dim(name: str, seen: Seen) -> None:
    if seen.places.class_dim is None:
        assert seen.given_logits is not None
        raise AccelError(
            f"`{name}` cannot tell which dimension of the logits holds the classes",
            f"logits {tuple(seen.given_logits.shape)}, and no criterion or labels that say it",
            "pass class_dim=1 for (batch, classes, ...) or class_dim=-1 for (batch, ..., classes)",
        )
