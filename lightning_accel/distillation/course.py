"""One fit as the teachers see it: the student's taps, what is ready, and the lessons of each step.

Everything is made ready before the first step, and again after each prune: the student found, teachers
bound to the device, taps set, projectors made and handed to the optimizer, the cache opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from lightning_accel.bridge.example import StepFailed
from lightning_accel.bridge.model_edit import tell
from lightning_accel.bridge.step import Around
from lightning_accel.distillation import evidence, heads, rehearsal
from lightning_accel.distillation.criterion import LABELS, NUMBERS
from lightning_accel.distillation.engine import Engine, Lesson
from lightning_accel.distillation.journal import Journal
from lightning_accel.distillation.optimizers import join
from lightning_accel.distillation.schedule import Moment
from lightning_accel.distillation.seen import LOGITS
from lightning_accel.distillation.steps import differentiable
from lightning_accel.distillation.tape import Record, Tape, is_compiled, layer
from lightning_accel.distillation.teacher import EMA, Teacher
from lightning_accel.distillation.views import SeededViews
from lightning_accel.distillation.world import all_rows, share_of_all
from lightning_accel.errors import AccelError, Unsupported, explain
from lightning_accel.surgery import Receipt

_EARLY = 16  # steps after which a teacher with classes swapped is told


class Course:
    """What belongs to one fit and is forgotten with it.

    Args:
        trainer: Of the fit.
        module: The user's.
        engine: Computes the losses.
        teachers: Those of the engine.
        journal: Gets what is worth logging.
        calls: Which calls of the student count: "error", "last" or "all".
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        engine: Engine,
        teachers: Sequence[Teacher],
        journal: Journal,
        calls: str,
    ) -> None:
        self.trainer, self.module = trainer, module
        self.engine, self.teachers, self.journal, self.calls = engine, teachers, journal, calls
        self.sharded = rehearsal.is_sharded(trainer)
        self.student: str | None = None
        self.tape: Tape | None = None
        self.around: list[Around] = []
        self.ready = False
        self.edit = Receipt()
        """What was done to the student since all was ready."""
        self.num_lessons = 0
        """Steps of this epoch in which something was taught."""
        self.batch: Any = None
        self.batch_idx = 0
        self.taught: list[Any] = []
        """Outputs of the student in this step that a loss has been added for."""
        self._classes_checked = False
        trained = all(teacher.kind in ("module", "path") for teacher in teachers)
        self._order = evidence.Order() if trained else None
        self._weighed_at: int | None = None

    @property
    def name(self) -> str:
        """How the student is called in messages."""
        return self.student or type(self.module).__name__

    def is_of(self, trainer: Trainer, module: LightningModule) -> bool:
        """Tell whether another fit would go on where this one ended."""
        return self.trainer is trainer and self.module is module

    def get_ready(self, batch: Any, batch_idx: int) -> None:
        """Prepare the next step if something has changed."""
        self.batch_idx = batch_idx
        if self.ready:
            return
        self._weighed_at = None
        if not self.sharded:
            try:
                self._rehearse(batch, batch_idx)
                return
            except StepFailed as error:  # the user's own error comes again in the real step
                rank_zero_warn(f"The first step could not be rehearsed. {error}")
        self.wire(self.student or rehearsal.static_student(self.module))

    def _rehearse(self, batch: Any, batch_idx: int) -> None:
        """Run the step on a copy: find the student, check everything, and make the projectors."""
        trainer, engine = self.trainer, self.engine
        with rehearsal.stage(trainer, self.module) as copy:
            name = self.student
            if name is None:
                name = rehearsal.find_student(trainer, copy, batch, batch_idx)
            if name is None:
                return  # the user skips this batch
            self.wire(name)
            found = rehearsal.record_on(trainer, copy, engine, name, batch, batch_idx, self.calls)
            if found is None:
                return
            record, batch = found.record, found.batch
            with torch.enable_grad(), trainer.precision_plugin.train_step_context():
                engine.look_at(record, batch, found.heard, found.task)
                answer = engine.run(record)
                trained = all(teacher.kind in ("module", "path") for teacher in self.teachers)
                if trained and not self._classes_checked:
                    rehearsal.check_classes(trainer, copy, engine, name, record, answer, batch)
                    self._classes_checked = True
                heads.narrow(engine, record, answer, self.edit, trainer.optimizers, prefix=name)
                engine.prepare(record, answer, batch)
        self._finish()

    def wire(self, name: str) -> None:
        """Bind the teachers, and put taps on the student of this name."""
        self.student, strategy = name, self.trainer.strategy
        student = layer(self.module, name)
        networks = [rehearsal.entry(teacher.network, name) for teacher in self.teachers]
        self.engine.wire(student, list(zip(self.teachers, networks, strict=True)))
        for index, (teacher, network) in enumerate(zip(self.teachers, networks, strict=True)):
            device = strategy.root_device
            precision = strategy.broadcast(teacher.resolved(device))
            taps = self.engine.teacher_taps(index)
            teacher.bind(network, taps=taps, device=device, precision=precision)
        if self.tape is not None:
            self.tape.remove()
        self.tape = Tape(student, self.engine.student_taps())
        if is_compiled(student):
            tell(self.trainer, "on_model_hooks_change", self.module)
            torch._dynamo.reset()  # graphs that exist never call hooks that come later

    def _finish(self) -> None:
        self.edit, self.ready = Receipt(), True
        self.join()
        self._open_cache()

    def join(self) -> None:
        """Let the student's optimizer train the projectors."""
        if not len(self.engine.heads):
            return
        if self.sharded:
            raise Unsupported(
                "projectors cannot be trained beside sharded parameters",
                type(self.trainer.strategy).__name__,
                "use layers of equal width, or 'similarity_preserving', which needs no projector",
            )
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        student = layer(self.module, self.student or "")
        join(self.trainer.optimizers, schedulers, self.engine.heads.parameters(), beside=student)

    def _open_cache(self) -> None:
        cache, temperature = self.engine.cache, self.engine.temperature()
        if cache is None:
            return
        if cache.top_k is not None and temperature is None:
            raise AccelError(
                "a cache of the top classes needs one constant temperature",
                "losses with several, or one that changes",
                "use one temperature, or a cache without `top_k`",
            )
        on_logits = [name for name, t in self.engine.terms.items() if t.reads == LOGITS]
        others = [n for n in on_logits if self.engine.terms[n].compares in (LABELS, NUMBERS)]
        if cache.top_k is not None and others:
            raise AccelError(
                "a cache of the top classes holds no labels and no numbers",
                f"top_k={cache.top_k} with the loss `{others[0]}`",
                "use a cache without `top_k`",
            )
        if cache.top_k is not None and on_logits and self.engine.classes_at is None:
            raise AccelError(
                "a cache of the top classes cannot tell which dimension of the logits holds them",
                "no criterion or labels that say it",
                "pass class_dim=1 or class_dim=-1, or a cache without `top_k`",
            )
        known = [teacher.fingerprint() for teacher in self.teachers]
        num_views = max((views.views for views in seeded_views(self.trainer)), default=1)
        cache.open(
            "-".join([*known, self.engine.questions()]),
            temperature=temperature or 1.0,
            views=num_views,
        )

    def recording(self) -> AbstractContextManager[None]:
        """Record the student's calls of a step; nothing while it is not known who that is."""
        return nullcontext() if self.tape is None else self.tape.recording()

    def records(self) -> list[Record]:
        """Return the calls of the student in this step that count."""
        if self.tape is None:
            return []
        found = [record for record in self.tape.records() if differentiable(record.output)]
        if len(found) > 1 and self.calls == "error" and self.module.automatic_optimization:
            raise AccelError(
                "the student was called several times in one training step",
                f"{len(found)} calls of `{self.name}`",
                "say which count: calls='last', or calls='all' for their mean",
            )
        return found[-1:] if self.calls == "last" else found

    def teach(self, task: Tensor, records: list[Record], batch: Any) -> Tensor:
        """Return the total loss of a step."""
        if not self.ready:  # there was no copy to rehearse on
            record = records[0]
            self.engine.look_at(record, batch)
            answer = self.engine.run(record)
            optimizers, prefix = self.trainer.optimizers, self.student or ""
            heads.narrow(self.engine, record, answer, self.edit, optimizers, prefix=prefix)
            self.engine.prepare(record, answer, batch)
            self._finish()
        lesson = self.engine.teach(task, records, batch, self.moment())
        self.num_lessons += 1
        self._watch_order(lesson)
        if self.log_is_due():
            self._note(lesson)
        return lesson.total

    def _watch_order(self, lesson: Lesson) -> None:
        """Keep what the teachers chose for the labels, in the first epoch."""
        seen, order = lesson.seen, self._order
        if order is None or seen is None or seen.chosen is None or seen.target is None:
            return
        if seen.target.is_floating_point() or seen.target.shape != seen.chosen.shape:
            return
        order.note(seen.chosen, seen.target, seen.labelled)
        if len(order) == _EARLY and self.trainer.world_size == 1:
            evidence.refuse_swapped(order.swapped())

    def check_order(self) -> None:
        """Raise at the end of the first epoch, in all processes, when the teacher has classes swapped."""
        order, self._order = self._order, None
        if order is not None:
            device = self.trainer.strategy.root_device
            pairs = torch.tensor([*order.swapped().items()], dtype=torch.long, device=device)
            evidence.refuse_swapped(dict(all_rows(pairs.view(-1, 2)).tolist()))

    def _note(self, lesson: Lesson) -> None:
        values = {name: part.value for name, part in lesson.parts.items()}
        seen = lesson.seen
        if seen is not None and seen.logits is not None and seen.chosen is not None:
            share = 1.0 if seen.valid is None else share_of_all(seen.valid)
            values["agreement"] = share * evidence.agreement(seen.logits, seen.chosen, seen.valid)
        self.journal.note(values)

    def weigh(self, batch: Any, every: int) -> None:
        """Measure each loss's share of the gradient now and then, and warn when the teacher has none."""
        step = self.trainer.global_step
        if self._weighed_at is None and any(teacher.kind == EMA for teacher in self.teachers):
            self._weighed_at = step  # an average that has just begun is the student itself
        recent = self._weighed_at is not None and step - self._weighed_at < every
        if recent or self.sharded or not self.ready:
            return
        self._weighed_at, moment = step, self.moment()
        shares = rehearsal.gradient_shares(
            self.trainer,
            self.module,
            self.engine,
            self.student or "",
            batch,
            self.batch_idx,
            self.calls,
            moment,
        )
        if not shares:
            self._weighed_at = None
            return
        self.journal.shares = shares
        active = [n for n, term in self.engine.terms.items() if term.values(moment)[0] != 0]
        silent = evidence.silent({name: shares.get(name, 0.0) for name in active})
        if silent:
            rank_zero_warn(
                explain(
                    "distillation has no effect"
                    if silent == active
                    else f"{', '.join(silent)} of the distillation has no effect",
                    "shares of the gradient: "
                    + ", ".join(f"{name} {share:.1g}" for name, share in shares.items()),
                    "raise the weights, tap layers that train, or pass a teacher that differs from the "
                    "student",
                )
            )

    def log_is_due(self) -> bool:
        """Tell whether this step's values are to be looked at; the first of each epoch always are."""
        return self.batch_idx % max(self.trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined]

    def moment(self) -> Moment:
        """Return where the fit is."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        within = self.batch_idx / batches if 0 < batches < float("inf") else 0.0
        epoch = trainer.current_epoch + within
        share = epoch / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0
        if trainer.max_steps > 0:
            share = max(share, trainer.global_step / trainer.max_steps)
        return Moment(trainer.global_step, epoch, min(share, 1.0))

    def leave(self) -> None:
        """Give the module its methods back, and take all hooks off."""
        for around in reversed(self.around):
            around.remove()
        self.around = []
        if self.tape is not None:
            self.tape.remove()
            self.tape = None
        for teacher in self.teachers:
            teacher.release()
        if self.engine.cache is not None:
            self.engine.cache.close()


def seeded_views(trainer: Trainer) -> list[SeededViews]:
    """Return the datasets of the training data that have a finite number of views."""
    found = []
    for loader in tree_leaves(trainer.train_dataloader):
        dataset: Any = loader.dataset if isinstance(loader, DataLoader) else None
        while dataset is not None and not isinstance(dataset, SeededViews):
            dataset = getattr(dataset, "dataset", None)
        if dataset is not None:
            found.append(dataset)
    return found
