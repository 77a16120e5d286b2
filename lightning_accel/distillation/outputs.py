"""One call of the student beside what the teachers said to it, each part found once and when asked for."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_accel.distillation import topk
from lightning_accel.distillation.criterion_gradient import left_out
from lightning_accel.distillation.forward_recorder import ForwardRecord
from lightning_accel.distillation.labels import Reading, mask_of, target_of
from lightning_accel.distillation.layers import Pair
from lightning_accel.distillation.locate import (
    Where,
    classes_back,
    classes_last,
    logits_of,
)
from lightning_accel.distillation.loss_term import LossTerm
from lightning_accel.distillation.projector import align
from lightning_accel.surgery.call import tensors

LOGITS, IDS = "logits", "logits_ids"

Answer = dict[str, Tensor]
"""What the teachers said to one call: "logits", and features by the number of the teacher and the layer."""


class Places(NamedTuple):
    """Where things are: the layers that give logits, labels, mask, the dimension of the classes, shifts."""

    logits: Pair | None
    target: Where
    mask: Where
    class_dim: int | None
    reading: Reading


class Outputs:
    """A call of the student, the teachers' answer, and the batch that led to it.

    Args:
        record: The call.
        answer: What the teachers said.
        batch: What the training step got.
        places: Where labels and masks are.
        task: The user's loss, where it says which positions count.
    """

    def __init__(
        self,
        record: ForwardRecord,
        answer: Answer,
        batch: Any,
        places: Places,
        task: Tensor | None = None,
    ) -> None:
        self.record, self.answer, self.batch, self.places = record, answer, batch, places
        self._task = task

    @cached_property
    def given_logits(self) -> Tensor | None:
        """The student's logits as they came."""
        if self.places.logits is not None:
            return self.record.taps[self.places.logits.student]
        return logits_of(self.record.output)

    @cached_property
    def logits(self) -> Tensor | None:
        """The student's logits (B, ..., C), in the precision that they came in."""
        given = self.given_logits
        return None if given is None else classes_last(given, self.places.class_dim)

    @cached_property
    def target(self) -> Tensor | None:
        """The labels of the logits' positions, where they can be found."""
        at = self.places
        return target_of(at.target, self.batch, self.record, self.logits, at.reading)

    @cached_property
    def of_outputs(self) -> list[Tensor]:
        """The tensors in the batch of the shape of the student's output that are not its input."""
        assert self.given_logits is not None
        shape, inputs = self.given_logits.shape, tensors((self.record.args, self.record.kwargs))
        used = {id(t) for t in inputs}
        leaves = [t for t in tensors(self.batch) if not t.is_complex() and t.shape == shape]
        found = [t for t in leaves if id(t) not in used]
        known = {id(t) for t in leaves}
        made = [t for t in inputs if id(t) not in known and t.shape == shape]  # of one of them
        return found[len(made) :]

    @cached_property
    def valid(self) -> Tensor | None:
        """Which positions count, or `None` for all."""
        valid = self._valid
        if self._task is None or self.logits is None:
            return valid
        if valid is None:  # in all processes there is a mask, or in none
            valid = torch.ones(self.logits.shape[:-1], dtype=torch.bool, device=self.logits.device)
        return valid if self._left_out is None else valid & ~self._left_out

    @property
    def num_left_out(self) -> int:
        """How many positions the user's loss leaves out that would count without it."""
        if self._left_out is None:
            return 0
        return int((self._left_out if self._valid is None else self._left_out & self._valid).sum())

    @cached_property
    def _valid(self) -> Tensor | None:
        at = self.places
        return mask_of(at.mask, self.batch, self.record, self.logits, self.target, at.reading)

    @cached_property
    def _left_out(self) -> Tensor | None:
        """The positions of a sequence or a map that the user's loss asks nothing of; `None` where nothing tells."""
        logits, dim = self.given_logits, self.places.class_dim
        return None if logits is None or dim is None else left_out(self._task, logits, dim)

    @cached_property
    def labelled(self) -> Tensor | None:
        """Where there is a label that counts, `None` without labels."""
        return None if self.target is None else self.places.reading.counts(self.target)

    @cached_property
    def chosen(self) -> Tensor | None:
        """The teacher's class at each position of the student's logits, `None` without."""
        teacher, ids = self.answer.get(LOGITS), self.answer.get(IDS)
        if self.logits is None or teacher is None or teacher.shape[:-1] != self.logits.shape[:-1]:
            return None
        if self.places.class_dim is None:
            return None
        if ids is not None:
            return ids[..., 0].long()
        return teacher.argmax(-1) if teacher.shape == self.logits.shape else None

    def both_logits(self, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return student, teacher and labels over the same classes, those of the cache if need be."""
        assert self.logits is not None
        student, teacher, target = full(self.logits), full(self.answer[LOGITS]), self.target
        if IDS in self.answer:
            ids = self.answer[IDS]
            student = topk.coarsen(student, ids, temperature)
            if target is not None:
                hit = ids == target.unsqueeze(-1)
                target = torch.where(hit.any(-1), hit.int().argmax(-1), ids.shape[-1])
        return student, teacher, target

    def as_given(self, logits: Tensor) -> Tensor:
        """Return logits with the classes where the network gave them, as a user's own loss knows them."""
        return classes_back(logits, self.places.class_dim)

    def features(self, pair: Pair, teacher: int) -> tuple[Tensor, Tensor]:
        """Return what a pair of layers gave."""
        return full(self.record.taps[pair.student]), full(self.answer[f"{teacher}:{pair.teacher}"])

    def aligned(self, term: LossTerm, pair: Pair, teacher: int) -> tuple[Tensor, Tensor]:
        """Return what a pair of layers gave in one layout and size; widths differ."""
        own, theirs = term.layouts
        return align(*self.features(pair, teacher), student_layout=own, teacher_layout=theirs)


def full(value: Tensor) -> Tensor:
    """Return a tensor in at least 32 bits."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
