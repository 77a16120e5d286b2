"""From one call of the student to one loss: ask the teachers, compare, add up.

The total is w_0 * task + sum_i w_i * L_i, with weights that may change over the fit. Everything is computed
in float32 outside of autocast. A loss that is a statistic of the batch sees the rows of all processes, and
a mean over valid positions counts those of all, so that two processes give what one gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.distillation import topk
from lightning_accel.distillation.cache import TeacherCache
from lightning_accel.distillation.layers import Pair, pairs
from lightning_accel.distillation.locate import (
    Where,
    is_shifted,
    logits_of,
    mask_of,
    target_of,
)
from lightning_accel.distillation.projector import Embedding, align, make_projector
from lightning_accel.distillation.schedule import Moment, Number, now
from lightning_accel.distillation.tape import Record
from lightning_accel.distillation.teacher import Teacher
from lightning_accel.distillation.term import Term
from lightning_accel.distillation.world import all_rows, num_processes, share_of_all
from lightning_accel.errors import AccelError

LOGITS, IDS = "logits", "logits_ids"

Answer = dict[str, Tensor]
"""What the teachers said to one call: "logits", and features by the number of the teacher and the layer."""


class Part(NamedTuple):
    """One summand: its weight and its value, unweighted."""

    weight: float
    value: Tensor


class Lesson(NamedTuple):
    """What one training step taught: the total loss, its parts, and the logits that were compared."""

    total: Tensor
    parts: dict[str, Part]
    student: Tensor | None
    teacher: Answer


class Engine:
    """Everything between a student's call and the loss; knows no Trainer.

    Args:
        terms: The summands by name.
        task_weight: Factor of the user's own loss.
        logits: Layers that give the logits, as a pair; by default what the networks return.
        target: Where the labels are in the batch.
        mask: Where the mask of valid positions is.
        cache: Of the teachers' outputs.
    """

    def __init__(
        self,
        terms: Mapping[str, Term],
        *,
        task_weight: Number = 1.0,
        logits: Any = None,
        target: Where = None,
        mask: Where = None,
        cache: TeacherCache | None = None,
    ) -> None:
        self.terms = dict(terms)
        self.task_weight = task_weight
        self.logits = logits
        self.target, self.mask = target, mask
        self.cache = cache
        self.teachers: list[Teacher] = []
        self.heads = nn.ModuleDict()
        """Projectors and embeddings, trained with the student and never a part of it."""
        self.shifted = False
        """Whether the network shifts its own labels; found out on the first batch."""
        self._pairs: dict[str, list[Pair]] = {}

    def wire(self, student: nn.Module, teachers: Sequence[tuple[Teacher, nn.Module]]) -> None:
        """Find the pairs of layers between the student and each teacher's network."""
        self.teachers = [teacher for teacher, _ in teachers]
        networks = [network for _, network in teachers]
        self._pairs = {}
        for name, term in self.terms.items():
            if term.layers is not None:
                self._pairs[name] = pairs(term.layers, student, networks[self._which(term)])
        if self.logits is not None:
            self._pairs[LOGITS] = pairs(self.logits, student, networks[0])[:1]

    def student_taps(self) -> list[str]:
        """Return the layers of the student to tap."""
        return [pair.student for found in self._pairs.values() for pair in found]

    def teacher_taps(self, index: int) -> list[str]:
        """Return the layers of a teacher to tap."""
        own = [
            p.teacher for n, found in self._pairs.items() for p in found if self._is_of(n, index)
        ]
        return list(dict.fromkeys(own))

    def questions(self) -> str:
        """Return what is asked of the teachers, for the key of a cache."""
        taps = [self.teacher_taps(index) for index in range(len(self.teachers))]
        return repr((taps, self._pairs.get(LOGITS)))

    def ask(self, record: Record) -> Answer:
        """Return what the teachers say to the arguments of a student's call, from the cache where known."""
        if self.cache is not None and self.cache.enabled:
            return self.cache.look_up(
                record.args, record.kwargs, lambda args, kwargs: self._run((args, kwargs))
            )
        return self._run((record.args, record.kwargs))

    def run(self, record: Record) -> Answer:
        """Return what the teachers say, without the cache."""
        return self._run((record.args, record.kwargs))

    def prepare(self, record: Record, answer: Answer, batch: Any) -> None:
        """Check everything that could fail later, and make the projectors that are missing.

        Raises:
            AccelError: Logits do not match, labels are missing, or a loss cannot be computed.
        """
        self.look_at(record)
        target = self._check_logits(record, answer, batch)
        for name, term in self.terms.items():
            if term.needs_target and target is None:
                raise AccelError(
                    f"`{name}` needs labels",
                    "no integers of the logits' shape, or several, in the batch",
                    "pass `target=`: a key or an index into the batch, or a function of it",
                )
            try:
                with torch.no_grad(), _in_full(next(iter(answer.values()))):
                    self._make_heads(name, term, record, answer)
                    self._value(name, term, record, answer, batch, term.values(Moment())[1])
            except (ValueError, TypeError, RuntimeError) as error:
                raise AccelError(
                    f"the loss `{name}` cannot be computed between this student and this teacher",
                    str(error),
                    "choose other layers or another loss",
                ) from error

    def teach(self, task: Tensor, records: Sequence[Record], batch: Any, moment: Moment) -> Lesson:
        """Return the total loss of a step; several calls of the student are averaged."""
        settings = {name: term.values(moment) for name, term in self.terms.items()}
        parts = {"task": Part(now(self.task_weight, moment), task)}
        active = [name for name, (weight, _) in settings.items() if weight != 0]
        total = parts["task"].weight * task
        student, answer = None, {}
        for record in records if active else ():
            answer = self.ask(record)
            student = self.student_logits(record)
            with _in_full(next(iter(answer.values()))):
                for name in active:
                    weight, keywords = settings[name]
                    value = self._value(name, self.terms[name], record, answer, batch, keywords)
                    value = value / len(records)
                    total = total + weight * value
                    before = parts[name].value if name in parts else 0.0
                    parts[name] = Part(weight, before + value.detach())
        return Lesson(total, parts, student, answer)

    def weighted(
        self, task: Tensor | None, record: Record, batch: Any, moment: Moment
    ) -> dict[str, Tensor]:
        """Return each weighted loss of one call by name, on one graph."""
        found = {} if task is None else {"task": now(self.task_weight, moment) * task}
        answer = self.run(record)
        with _in_full(next(iter(answer.values()))):
            for name, term in self.terms.items():
                weight, keywords = term.values(moment)
                if weight:
                    value = self._value(name, term, record, answer, batch, keywords)
                    found[name] = weight * value
        return found

    def look_at(self, record: Record) -> None:
        """Note from a first call what stays the same for all."""
        self.shifted = is_shifted(record, self.student_logits(record))

    def student_logits(self, record: Record) -> Tensor | None:
        """Return the student's logits of a call."""
        if LOGITS in self._pairs:
            return record.taps[self._pairs[LOGITS][0].student]
        return logits_of(record.output)

    def labels(self, record: Record, batch: Any) -> Tensor | None:
        """Return the labels of a call, where they can be found."""
        logits = self.student_logits(record)
        return target_of(self.target, batch, record, logits, shifted=self.shifted)

    def valid(self, record: Record, batch: Any) -> Tensor | None:
        """Return which positions count, or `None` for all."""
        logits = self.student_logits(record)
        return mask_of(self.mask, batch, record, logits, self.labels(record, batch))

    def temperature(self) -> float | None:
        """Return the one temperature of all losses on logits, or `None` when they have several."""
        found = {t.fixed_temperature() for t in self.terms.values() if t.reads == LOGITS}
        return found.pop() if len(found) == 1 else (1.0 if not found else None)

    def _run(self, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Answer:
        answer: Answer = {}
        whole = sum(teacher.weight for teacher in self.teachers)
        for index, teacher in enumerate(self.teachers):
            record = teacher(call)
            for name, value in record.taps.items():
                answer[f"{index}:{name}"] = value
            logits = self._teacher_logits(record, index, answer)
            if logits is not None:
                if teacher.classes is not None:
                    logits = logits[..., list(teacher.classes)]
                share = teacher.weight / whole
                logits = logits if share == 1 else share * _full(logits)
                if LOGITS in answer and answer[LOGITS].shape != logits.shape:
                    raise AccelError(
                        "the logits of the teachers do not match",
                        f"{tuple(answer[LOGITS].shape)} and {tuple(logits.shape)}",
                        "use teachers with the same classes, or `Teacher(classes=)` to pick them",
                    )
                answer[LOGITS] = answer[LOGITS] + logits if LOGITS in answer else logits
        return answer

    def _teacher_logits(self, record: Record, index: int, answer: Answer) -> Tensor | None:
        if LOGITS in self._pairs:
            name = self._pairs[LOGITS][0].teacher
            features = any(self._is_of(n, index) for n in self._pairs if n != LOGITS)
            kept = features and any(
                pair.teacher == name
                for n, found in self._pairs.items()
                if n != LOGITS
                for pair in found
            )
            key = f"{index}:{name}"
            return answer[key] if kept else answer.pop(key)
        return logits_of(record.output)

    def _value(
        self,
        name: str,
        term: Term,
        record: Record,
        answer: Answer,
        batch: Any,
        keywords: dict[str, Any],
    ) -> Tensor:
        given = dict(keywords)
        target = self.labels(record, batch) if "target" in term.takes else None
        mask = None
        if term.reads == LOGITS:
            student, teacher, target = self._both_logits(record, answer, keywords, target)
            both = [(student, teacher)]
            if "mask" in term.takes:
                mask = self.valid(record, batch)
        else:
            both = [
                self._features(name, term, i, record, answer) for i in range(len(self._pairs[name]))
            ]
        if target is not None and mask is not None:
            target = target.masked_fill(~mask, 0)  # what is ignored needs a class all the same
        if mask is not None:
            given["mask"] = mask
        value = torch.zeros((), device=both[0][0].device)
        for student, teacher in both:
            if target is not None:
                given["target"] = target
            value = value + _evaluate(term, student, teacher, given)
        return value

    def _both_logits(
        self, record: Record, answer: Answer, keywords: dict[str, Any], target: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        student = self.student_logits(record)
        assert student is not None
        student, teacher = _full(student), _full(answer[LOGITS])
        if IDS in answer:
            ids = answer[IDS]
            temperature = float(keywords.get("temperature", self.temperature() or 1.0))
            student = topk.coarsen(student, ids, temperature)
            if target is not None:
                hit = ids == target.unsqueeze(-1)
                target = torch.where(hit.any(-1), hit.int().argmax(-1), ids.shape[-1])
        return student, teacher, target

    def _features(
        self, name: str, term: Term, index: int, record: Record, answer: Answer
    ) -> tuple[Tensor, Tensor]:
        pair = self._pairs[name][index]
        student = _full(record.taps[pair.student])
        teacher = _full(answer[f"{self._which(term)}:{pair.teacher}"])
        key = _key(name, index)
        if term.reads == "embedded":
            return self.heads[f"{key}_student"](student), self.heads[f"{key}_teacher"](teacher)
        if term.reads in ("matched", "maps"):
            student, teacher = align(
                student, teacher, student_layout=term.layouts[0], teacher_layout=term.layouts[1]
            )
        if term.reads == "maps" and student.dim() == 3:
            return student.transpose(1, 2), teacher.transpose(1, 2)  # tokens: (B, D, T)
        if key in self.heads:
            student = self.heads[key](student)
        return student, teacher

    def _make_heads(self, name: str, term: Term, record: Record, answer: Answer) -> None:
        if term.reads not in ("matched", "embedded"):
            return
        for index, pair in enumerate(self._pairs[name]):
            key, teacher = _key(name, index), answer[f"{self._which(term)}:{pair.teacher}"]
            student = record.taps[pair.student]
            made: dict[str, nn.Module | None] = {}
            if term.reads == "embedded":
                for side, feature in (("student", student), ("teacher", teacher)):
                    layout = term.layouts[side == "teacher"]
                    if f"{key}_{side}" not in self.heads:
                        made[f"{key}_{side}"] = Embedding.of(
                            _full(feature), layout=layout, seed=len(self.heads) + len(made)
                        )
            elif key not in self.heads:
                aligned = align(
                    _full(student),
                    _full(teacher),
                    student_layout=term.layouts[0],
                    teacher_layout=term.layouts[1],
                )
                made[key] = make_projector(*aligned, seed=len(self.heads))
            for made_key, head in made.items():
                if head is not None:
                    self.heads[made_key] = head.to(student.device)

    def widths(self, record: Record, answer: Answer) -> Iterator[tuple[str, str, int]]:
        """Yield each head of the student's side, the layer that it reads, and how wide that is now."""
        for name, term in self.terms.items():
            if term.reads not in ("matched", "embedded"):
                continue
            for index, pair in enumerate(self._pairs[name]):
                student = _full(record.taps[pair.student])
                key = _key(name, index)
                if term.reads == "embedded":
                    width = Embedding.of(student, 1, layout=term.layouts[0]).weight.shape[1]
                    yield f"{key}_student", pair.student, width
                    continue
                teacher = _full(answer[f"{self._which(term)}:{pair.teacher}"])
                aligned, _ = align(
                    student,
                    teacher,
                    student_layout=term.layouts[0],
                    teacher_layout=term.layouts[1],
                )
                yield key, pair.student, aligned.shape[-1 if aligned.dim() < 4 else 1]

    def _check_logits(self, record: Record, answer: Answer, batch: Any) -> Tensor | None:
        needed = [name for name, term in self.terms.items() if term.reads == LOGITS]
        student, teacher = self.student_logits(record), answer.get(LOGITS)
        if needed and (student is None or teacher is None):
            raise AccelError(
                f"`{needed[0]}` needs logits",
                f"the {'student' if student is None else 'teacher'} returns no tensor, or several, of shape "
                f"(batch, ..., classes) within a {type(record.output).__name__}",
                "name the layers that give them: logits='head: fc', or use losses on features",
            )
        if student is None:
            return None
        if needed and teacher is not None:
            ids = answer.get(IDS)
            shape = teacher.shape if ids is None else (*teacher.shape[:-1], student.shape[-1])
            if student.shape != torch.Size(shape):
                raise AccelError(
                    "the logits of the student and the teacher do not match",
                    f"{tuple(student.shape)} and {tuple(shape)}",
                    "use a teacher with the same classes or vocabulary, `Teacher(classes=)` to pick "
                    "them, or losses on features",
                )
        return self.labels(record, batch)

    def _which(self, term: Term) -> int:
        if term.teacher is None and len(self.teachers) > 1:
            raise AccelError(
                f"`{term.name}` reads features of one teacher, and there are several",
                f"{len(self.teachers)} teachers",
                "say which: teacher=0 among the keywords of the loss",
            )
        return term.teacher or 0

    def _is_of(self, name: str, index: int) -> bool:
        return name == LOGITS or self._which(self.terms[name]) == index


def _evaluate(term: Term, student: Tensor, teacher: Tensor, given: dict[str, Any]) -> Tensor:
    """Compute one loss over the rows of all processes."""
    if term.across_rows and student.shape[:-1].numel() * num_processes() < 2:
        return 0.0 * student.sum()  # a last batch of one row has no relations
    if num_processes() == 1:
        return term.loss(student, teacher, **given)
    if term.across_rows:
        student, teacher = all_rows(student), all_rows(teacher)
        given = {k: all_rows(v) if isinstance(v, Tensor) else v for k, v in given.items()}
        value = term.loss(student, teacher, **given)
        # Each process has the gradient of its own rows only, and gradients are averaged.
        return value + (num_processes() - 1) * (value - value.detach())
    value = term.loss(student, teacher, **given)
    mask = given.get("mask")
    return value if mask is None else value * share_of_all(mask)


def _full(value: Tensor) -> Tensor:
    short = value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if short else value


def _in_full(like: Tensor) -> Any:
    return torch.autocast(like.device.type, enabled=False)


def _key(name: str, index: int) -> str:
    return f"{name.replace('.', '-')}_{index}"
