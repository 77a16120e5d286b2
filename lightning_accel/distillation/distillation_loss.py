"""From one call of the student to one loss: ask the teachers, compare, add up.

The total is w_0 * task + sum_i w_i * L_i, with weights that may change over the fit. Everything is computed
in float32 outside of autocast. A loss that is a statistic of the batch sees the rows of all processes, and
a mean over valid positions counts those of all, so that two processes give what one gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.distillation.cache import TeacherCache
from lightning_accel.distillation.checks import EXACT, SHORT
from lightning_accel.distillation.criterion import CLASSES, Hearing, Usage, usage
from lightning_accel.distillation.criterion_gradient import class_dim_in, takes, unheard
from lightning_accel.distillation.distributed import any_of_all
from lightning_accel.distillation.forward_recorder import ForwardRecord
from lightning_accel.distillation.labels import Reading, read
from lightning_accel.distillation.layers import Pair, pairs
from lightning_accel.distillation.locate import Where, class_dim_of, classes_last, logits_of
from lightning_accel.distillation.loss_output import LossOutput, WeightedLoss
from lightning_accel.distillation.loss_term import LossTerm
from lightning_accel.distillation.outputs import LOGITS, Answer, Outputs, Places, full
from lightning_accel.distillation.projector import Embedding, make_projector
from lightning_accel.distillation.schedule import FitProgress, Number, now
from lightning_accel.distillation.suitable import (
    account,
    check_logits,
    check_outputs,
    picked,
    suited,
    warn_of_others,
)
from lightning_accel.distillation.teacher import Teacher
from lightning_accel.errors import AccelError


class DistillationLoss:
    """Everything between a student's call and the loss; knows no Trainer.

    Args:
        terms: The summands by name.
        task_weight: Factor of the user's own loss.
        logits: Layers that give the logits, as a pair; by default what the networks return.
        class_dim: Their dimension that holds the classes; by default told at the first step.
        target: Where the labels are in the batch.
        mask: Where the mask of valid positions is.
        cache: Of the teachers' outputs.
    """

    def __init__(
        self,
        terms: Mapping[str, LossTerm],
        *,
        task_weight: Number = 1.0,
        logits: Any = None,
        class_dim: int | None = None,
        target: Where = None,
        mask: Where = None,
        cache: TeacherCache | None = None,
    ) -> None:
        self.asked, self.terms = dict(terms), dict(terms)
        """The summands as they were asked for, and as they suit what is taught."""
        self.task_weight = task_weight
        self.logits, self.class_dim = logits, class_dim
        self.target, self.mask = target, mask
        self.cache = cache
        self.teachers: list[Teacher] = []
        self.heads = nn.ModuleDict()
        """Projectors and embeddings, trained with the student and never a part of it."""
        self.usage = Usage()
        """What the user's criteria take the logits for, as heard on the first batch."""
        self.reads_loss = False
        """Whether the user's loss is asked at each step which positions it leaves out."""
        self.classes_at: int | None = None
        """The dimension of the classes, found out on the first batch; `None` where nothing tells."""
        self.reading = Reading()
        """Which label belongs to which position; found out on the first batch."""
        self._pairs: dict[str, list[Pair]] = {}
        self._views = 1

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
        return repr((taps, self._pairs.get(LOGITS), self.classes_at))

    def ask(self, record: ForwardRecord) -> Answer:
        """Return what the teachers say to the arguments of a student's call, from the cache where known."""
        if self.cache is not None:  # one that is off runs the teacher, and answers in the same form
            if self.cache.enabled and any(teacher.has_changed() for teacher in self.teachers):
                self._key()
            return self.cache.look_up(
                record.args, record.kwargs, lambda args, kwargs: self._run((args, kwargs))
            )
        return self._run((record.args, record.kwargs))

    def open_cache(self, record: ForwardRecord, *, views: int) -> None:
        """Use the cache, if the teachers are such that what they say depends on weights and arguments alone.

        Args:
            record: A call of the student, on which they are tried.
            views: Epochs in which every row may be new.
        """
        assert self.cache is not None
        self._views = views
        self._key()
        for index, teacher in enumerate(self.teachers):
            reason = teacher.moves((record.args, record.kwargs))
            if reason is not None:
                self.cache.step_aside(
                    f"teacher {index}, {type(teacher.network).__name__}, {reason}"
                )

    def _key(self) -> None:
        """Open the cache for the teachers as they are now."""
        assert self.cache is not None
        known = [teacher.fingerprint() for teacher in self.teachers]
        self.cache.open(
            "-".join([*known, self.questions()]),
            temperature=self.temperature() or 1.0,
            views=self._views,
            tolerance=SHORT if any(teacher.is_short for teacher in self.teachers) else EXACT,
        )

    def run(self, record: ForwardRecord) -> Answer:
        """Return what the teachers say, without the cache, which is asked again: so without a trace beside one."""
        with ExitStack() as stack:
            for teacher in self.teachers if self.cache is not None else ():
                stack.enter_context(teacher.aside())
            return self._run((record.args, record.kwargs))

    def see(
        self, record: ForwardRecord, answer: Answer, batch: Any, task: Tensor | None = None
    ) -> Outputs:
        """Put a call of the student beside the teachers' answer, and the user's loss where that says what counts."""
        logits = next(iter(self._pairs.get(LOGITS, ())), None)
        places = Places(logits, self.target, self.mask, self.classes_at, self.reading)
        return Outputs(record, answer, batch, places, task if self.reads_loss else None)

    def look_for_left_out(self, task: Tensor | None, record: ForwardRecord, batch: Any) -> int:
        """Begin to read from each step's loss which positions count, where that leaves out more; return how many."""
        masked = any(t.reads == LOGITS and "mask" in t.takes for t in self.terms.values())
        if self.reads_loss or self.mask is not None or self.classes_at is None or not masked:
            return 0
        outputs = Outputs(record, {}, batch, self.see(record, {}, batch).places, task)
        if outputs.given_logits is None or outputs.given_logits.dim() < 3:
            return 0
        num = outputs.num_left_out
        self.reads_loss = any_of_all(num > 0, record.output)
        return num

    def look_at(
        self, record: ForwardRecord, batch: Any, hearings: Sequence[Hearing] = ()
    ) -> str | None:
        """Note from a first call what stays the same for all, and return what is only supposed.

        Args:
            record: The call.
            batch: What the training step got.
            hearings: What the user's criteria were called on; the first that says something counts.

        Raises:
            AccelError: The outputs are not what a loss compares, or `class_dim` is not among their dimensions.
        """
        self.reads_loss = False
        logits = self.see(record, {}, batch).given_logits
        found = (self._usage(hearing) for hearing in hearings)
        self.usage = next((one for one in found if one.says_something), Usage())
        rest = self._unheard(logits, hearings)
        self.classes_at = None if logits is None else self._class_dim(logits, record, batch, rest)
        self.usage = self.usage._replace(rest=takes(rest, self.classes_at))
        moved = self.see(record, {}, batch).logits
        self.reading, counted = read(self.target, batch, record, moved, self.usage)
        outputs = self.see(record, {}, batch)
        self.terms = suited(self.asked, outputs, self.usage)
        check_outputs(self.terms, outputs, self.usage)
        task = hearings[0].task if hearings else None
        self.look_for_left_out(task, record, batch)
        outputs = self.see(record, {}, batch, task)
        if counted is not None and any(term.reads == LOGITS for term in self.terms.values()):
            warn_of_others(outputs, counted)
        return account(self.terms, outputs, self.usage)

    def _usage(self, hearing: Hearing) -> Usage:
        logits = self.see(hearing.record, {}, None).given_logits
        return usage(hearing.calls, logits, hearing.task)

    def _unheard(self, logits: Tensor | None, hearings: Sequence[Hearing]) -> Tensor | None:
        """Return what the user's loss asks of the logits, but for what criteria of labels and numbers do."""
        if logits is None or self.usage.class_dim is not None or CLASSES in self.usage.kinds:
            return None
        return unheard(hearings[0].task, logits, hearings[0].calls) if hearings else None

    def _class_dim(
        self, logits: Tensor, record: ForwardRecord, batch: Any, rest: Tensor | None
    ) -> int | None:
        if self.class_dim is None:
            known = self.usage.class_dim if rest is None else class_dim_in(rest)
            return class_dim_of(logits, batch, record) if known is None else known
        if (
            self.class_dim in (0, -logits.dim())
            or not -logits.dim() < self.class_dim < logits.dim()
        ):
            raise AccelError(
                "the logits have no classes in that dimension",
                f"class_dim={self.class_dim} for logits {tuple(logits.shape)}",
                "count dimensions as torch does; 0 is the batch",
            )
        return self.class_dim

    def prepare(self, record: ForwardRecord, answer: Answer, batch: Any, task: Tensor) -> None:
        """Check everything that could fail later, and make the projectors that are missing.

        Raises:
            AccelError: Logits do not match, labels are missing, or a loss cannot be computed.
        """
        outputs = self.see(record, answer, batch, task)
        check_logits(self.terms, outputs)
        for name, term in self.terms.items():
            if term.needs_target and outputs.target is None:
                raise AccelError(
                    f"`{name}` needs labels",
                    "no integers of the logits' shape, or several, in the batch",
                    "pass `target=`: a key or an index into the batch, or a function of it",
                )
            try:
                with torch.no_grad(), _in_full(answer):
                    self._make_heads(name, term, outputs)
                    self._value(name, term, outputs, term.values(FitProgress())[1])
            except (ValueError, TypeError, RuntimeError) as error:
                raise AccelError(
                    f"the loss `{name}` cannot be computed between this student and this teacher",
                    str(error),
                    "choose other layers or another loss",
                ) from error

    def compute_loss(
        self,
        task: Tensor,
        records: Sequence[ForwardRecord],
        batch: Any,
        moment: FitProgress,
        scale: Tensor | float = 1.0,
        known: Answer | None = None,
    ) -> LossOutput:
        """Return the total loss of a step; several calls of the student are averaged.

        Args:
            task: The user's loss.
            records: The student's calls, in a step that got `batch` at that `moment`.
            scale: Factor of all losses but the user's.
            known: What the teachers have just said to the first call.
        """
        weight = now(self.task_weight, moment)
        total, parts, outputs = weight * task, {"task": WeightedLoss(weight, task.detach())}, None
        settings = {name: term.values(moment) for name, term in self.terms.items()}
        active = {name: setting for name, setting in settings.items() if setting[0] != 0}
        for record in records if active else ():
            answer, known = self.ask(record) if known is None else known, None
            outputs = self.see(record, answer, batch, task)
            with _in_full(outputs.answer):
                for name, (weight, keywords) in active.items():
                    value = self._value(name, self.terms[name], outputs, keywords) / len(records)
                    total = total + scale * weight * value
                    before = parts[name].value if name in parts else 0.0
                    parts[name] = WeightedLoss(weight, before + value.detach())
        return LossOutput(total, parts, outputs)

    def weighted(
        self,
        task: Tensor | None,
        record: ForwardRecord,
        answer: Answer,
        batch: Any,
        moment: FitProgress,
        scale: Tensor | float = 1.0,
    ) -> dict[str, Tensor]:
        """Return each weighted loss of one call by name, on one graph; see `compute_loss`."""
        found = {} if task is None else {"task": now(self.task_weight, moment) * task}
        outputs = self.see(record, answer, batch, task)
        with _in_full(outputs.answer):
            for name, term in self.terms.items():
                weight, keywords = term.values(moment)
                if weight:
                    found[name] = scale * weight * self._value(name, term, outputs, keywords)
        return found

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
                logits = classes_last(logits, self.classes_at)
                if teacher.classes is not None:
                    logits = picked(logits, teacher.classes)
                share = teacher.weight / whole
                logits = logits if share == 1 else share * full(logits)
                if LOGITS in answer and answer[LOGITS].shape != logits.shape:
                    raise AccelError(
                        "the logits of the teachers do not match",
                        f"{tuple(answer[LOGITS].shape)} and {tuple(logits.shape)}",
                        "use teachers with the same classes, or `Teacher(classes=)` to pick them",
                    )
                answer[LOGITS] = answer[LOGITS] + logits if LOGITS in answer else logits
        return answer

    def _teacher_logits(self, record: ForwardRecord, index: int, answer: Answer) -> Tensor | None:
        if LOGITS not in self._pairs:
            return logits_of(record.output)
        name = self._pairs[LOGITS][0].teacher
        features = [
            pair.teacher
            for other, found in self._pairs.items()
            for pair in found
            if other != LOGITS and self._is_of(other, index)
        ]
        key = f"{index}:{name}"
        return answer[key] if name in features else answer.pop(key)

    def _value(
        self, name: str, term: LossTerm, outputs: Outputs, keywords: dict[str, Any]
    ) -> Tensor:
        given = dict(keywords)
        target = None
        if term.reads == LOGITS:
            temperature = float(keywords.get("temperature", self.temperature() or 1.0))
            student, teacher, target = outputs.both_logits(temperature)
            if term.compares is None:
                student, teacher = outputs.as_given(student), outputs.as_given(teacher)
            both = [(student, teacher)]
            valid = outputs.valid
            if valid is None and term.needs_target and outputs.target is not None:
                valid = outputs.labelled  # others learn from samples without a label as well
            if "mask" in term.takes and valid is not None:
                given["mask"] = valid
        else:
            both = [self._pair(name, term, i, outputs) for i in range(len(self._pairs[name]))]
        if "target" in term.takes:
            given["target"] = outputs.target if target is None else target
        value = torch.zeros((), device=both[0][0].device)
        for student, teacher in both:
            value = value + term.over_all(student, teacher, given)
        return value

    def _pair(
        self, name: str, term: LossTerm, index: int, outputs: Outputs
    ) -> tuple[Tensor, Tensor]:
        """Return what a pair of layers gave, in the form that the loss reads."""
        pair, key, which = self._pairs[name][index], _key(name, index), self._which(term)
        if term.reads not in ("matched", "maps"):
            student, teacher = outputs.features(pair, which)
        else:
            student, teacher = outputs.aligned(term, pair, which)
        if term.reads == "embedded":
            return self.heads[f"{key}_student"](student), self.heads[f"{key}_teacher"](teacher)
        if term.reads == "maps" and student.dim() == 3:
            return student.transpose(1, 2), teacher.transpose(1, 2)  # tokens: (B, D, T)
        return self.heads[key](student) if key in self.heads else student, teacher

    def _make_heads(self, name: str, term: LossTerm, outputs: Outputs) -> None:
        for index, pair in enumerate(self._pairs.get(name, ())):
            key, which = _key(name, index), self._which(term)
            made: dict[str, nn.Module | None] = {}
            if term.reads == "embedded":
                features, seed = outputs.features(pair, which), len(self.heads)
                for i, side in enumerate(("student", "teacher")):
                    layout = term.layouts[i]
                    made[f"{key}_{side}"] = Embedding.of(features[i], layout=layout, seed=seed + i)
            elif term.reads == "matched":
                aligned = outputs.aligned(term, pair, which)
                made[key] = make_projector(*aligned, seed=len(self.heads))
            for place, head in made.items():
                if head is not None and place not in self.heads:
                    self.heads[place] = head

    def widths(self, record: ForwardRecord, answer: Answer) -> Iterator[tuple[str, str, int]]:
        """Yield each head of the student's side, the layer that it reads, and how wide that is now."""
        outputs = self.see(record, answer, None)
        for name, term in self.terms.items():
            for index, pair in enumerate(self._pairs.get(name, ())):
                key, which = _key(name, index), self._which(term)
                if term.reads == "embedded":
                    feature = outputs.features(pair, which)[0]
                    width = Embedding.of(feature, 1, layout=term.layouts[0]).weight.shape[1]
                    yield f"{key}_student", pair.student, width
                elif term.reads == "matched":
                    aligned = outputs.aligned(term, pair, which)[0]
                    yield key, pair.student, aligned.shape[-1 if aligned.dim() < 4 else 1]

    def _which(self, term: LossTerm) -> int:
        if term.teacher is None and len(self.teachers) > 1:
            raise AccelError(
                f"`{term.name}` reads features of one teacher, and there are several",
                f"{len(self.teachers)} teachers",
                "say which: teacher=0 among the keywords of the loss",
            )
        return term.teacher or 0

    def _is_of(self, name: str, index: int) -> bool:
        return name == LOGITS or self._which(self.terms[name]) == index


def _in_full(answer: Answer) -> Any:
    return torch.autocast(next(iter(answer.values())).device.type, enabled=False)


def _key(name: str, index: int) -> str:
    return f"{name.replace('.', '-')}_{index}"
