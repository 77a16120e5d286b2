"""One fit as the teachers see it: the student's taps, what is ready, and the losses of each step.

Everything is made ready within the first step, and again after each prune: the student is found as it is called,
teachers are bound to the device, taps set, projectors made and handed to the optimizer, the cache opened. So the
user's step runs as often as without us, and every error still comes before the first backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from lightning_accel.bridge.model_edit import tell
from lightning_accel.bridge.step import Around
from lightning_accel.distillation import diagnostics, dry_run, heads
from lightning_accel.distillation.criterion import LABELS, NUMBERS, Heard, Hearing, Listener
from lightning_accel.distillation.distillation_loss import DistillationLoss
from lightning_accel.distillation.distributed import all_rows, among, share_of_all
from lightning_accel.distillation.forward_recorder import ForwardRecord, ForwardRecorder, layer
from lightning_accel.distillation.loss_output import LossOutput
from lightning_accel.distillation.metrics import DistillationMetrics
from lightning_accel.distillation.optimizers import join
from lightning_accel.distillation.outputs import LOGITS, Answer, Outputs
from lightning_accel.distillation.schedule import FitProgress
from lightning_accel.distillation.steps import differentiable
from lightning_accel.distillation.suitable import check_top_classes
from lightning_accel.distillation.teacher import EMA, Teacher
from lightning_accel.distillation.teacher_errors import lacks_numbers, not_a_number
from lightning_accel.distillation.views import views_in
from lightning_accel.distillation.watch import OutermostCalls, StudentWatcher, around_compiled
from lightning_accel.errors import AccelError, Unsupported, explain
from lightning_accel.surgery import Receipt
from lightning_accel.surgery.compiled import is_compiled

_EARLY = 16
"""Steps after which a teacher with classes in another order is told, and one that knows nothing."""
_LEFT_OUT = "The training step's own loss leaves positions out, and so does distillation; whole samples learn all the same."
# Told whether all was just made ready, returns the factor of the losses of distillation.
ScaleOf = Callable[[bool], Tensor | float]


class FitState:
    """What belongs to one fit and is forgotten with it.

    Args:
        trainer: Of the fit.
        module: The user's.
        engine: Computes the losses.
        teachers: Those of the engine.
        metrics: Gets what is worth logging.
        calls: Which calls of the student count: "error", "last" or "all".
        diagnostics_every_n_steps: Steps between two measurements of each loss's share of the gradient; 0 is never.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        *,
        engine: DistillationLoss,
        teachers: Sequence[Teacher],
        metrics: DistillationMetrics,
        calls: str,
        diagnostics_every_n_steps: int = 0,
    ) -> None:
        self.trainer, self.module = trainer, module
        self.engine, self.teachers, self.metrics, self.calls = engine, teachers, metrics, calls
        self.student: str | None = None
        self.recorder: ForwardRecorder | None = None
        self.around: list[Around] = []
        self.ready = False
        self.edit = Receipt()
        """What was done to the student since all was ready."""
        self.num_taught = 0
        """Steps of this epoch in which something was taught."""
        self.could_teach = False
        """Whether in this epoch the student was called with a gradient, or something was learned."""
        self.batch_idx = 0
        self.diagnostics_every_n_steps = diagnostics_every_n_steps
        trained = all(teacher.kind in ("module", "path") for teacher in teachers)
        self._order = diagnostics.ClassOrder() if trained else None
        """What the teachers chose for the labels of the first epoch; `None` when settled."""
        self._weighed_at: int | None = None
        self._nan = torch.tensor(False)
        """Whether a teacher gave what is no number."""
        self._unseen = 0
        """Steps in which nobody looked for positions that the loss leaves out."""
        self._watches: list[OutermostCalls | Listener] = []
        """What stands around the first step."""
        self.heard: list[Heard] = []
        """The criteria of the user's that were called in it."""
        self.passed: list[Tensor] = []
        """What `Tensor.backward` was called of in it."""

    @property
    def _compares_classes(self) -> bool:
        """Whether a loss takes the logits for classes, and not for labels or numbers."""
        terms = [term for term in self.engine.terms.values() if term.reads == LOGITS]
        return any(term.compares not in (LABELS, NUMBERS) for term in terms)

    @property
    def sharded(self) -> bool:
        """Whether a strategy shards parameters, which some choose after the start."""
        return dry_run.is_sharded(self.trainer)

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
        for views in views_in(self.trainer.train_dataloader):
            views.set_epoch(self.trainer.current_epoch)
        if self.student is None and self.sharded:
            self.student = dry_run.static_student(self.module)
        if self.student is not None:
            self.wire(self.student)

    def wire(self, name: str) -> None:
        """Bind the teachers, and put taps on the student of this name."""
        self.student, strategy = name, self.trainer.strategy
        student = layer(self.module, name)
        networks = [dry_run.entry(t.network, name, self.module) for t in self.teachers]
        for teacher, network in zip(self.teachers, networks, strict=True):
            if network is not teacher.network and is_overridden("forward", teacher.network):
                rank_zero_info(
                    f"The teacher {type(teacher.network).__name__} is called by its part `{name}`, as the student "
                    "of this class is, and not by its own `forward`; pass a wrapper of it to have that called."
                )
        self.engine.wire(student, list(zip(self.teachers, networks, strict=True)))
        for index, (teacher, network) in enumerate(zip(self.teachers, networks, strict=True)):
            device = strategy.root_device
            precision = strategy.broadcast(teacher.resolved(device))
            taps = self.engine.teacher_taps(index)
            teacher.bind(network, taps=taps, device=device, precision=precision)
        if self.recorder is not None:
            self.recorder.remove()
        self.recorder = ForwardRecorder(student, self.engine.student_taps())
        if is_compiled(student):
            tell(self.trainer, "on_model_hooks_change", self.module)
            torch._dynamo.reset()  # graphs that exist never call hooks that come later

    def _prepare(self, record: ForwardRecord, batch: Any, task: Tensor) -> Answer | None:
        """Get ready for the first lesson; return what the teachers said, `None` where a cache knows it."""
        engine, student = self.engine, layer(self.module, self.student or "")
        dry_run.refuse_without_gradient(student, record)
        self._look_at(record, batch, task)
        answer = engine.run(record)
        optimizers, prefix = self.trainer.optimizers, self.student or ""
        heads.narrow(engine, record, answer, self.edit, optimizers, prefix=prefix)
        engine.prepare(record, answer, batch, task)
        self._check_names()
        self.edit, self.ready = Receipt(), True
        self.join()
        self._open_cache(record)
        return answer if engine.cache is None else None

    def _look_at(self, record: ForwardRecord, batch: Any, task: Tensor) -> None:
        """Let the engine note how the user's criteria take what the student gives."""
        engine, student = self.engine, layer(self.module, self.student or "")
        hearings = [Hearing(record, self.heard, task)]
        with ExitStack() as stack:
            if not self.sharded and is_compiled(student):
                # In compiled code nothing is heard, and nothing tells what is changed in place.
                once = dry_run.rerun(self.trainer, self.module, engine, self.student or "", record)
                hearings.append(stack.enter_context(once).hearing)
            supposed = engine.look_at(record, batch, hearings)
        if supposed is not None:
            rank_zero_info(supposed)
        if engine.reads_loss:
            rank_zero_info(_LEFT_OUT)

    def _check_names(self) -> None:
        if not any(term.reads == LOGITS for term in self.engine.terms.values()):
            self._order = None
        if self._order is None or not self._compares_classes:
            return
        student, data = layer(self.module, self.student or ""), self.trainer.datamodule  # type: ignore[attr-defined]
        own = dry_run.class_names(self.module, student, data)
        for teacher in self.teachers:
            if teacher.classes is None:
                diagnostics.check_names(own, dry_run.class_names(teacher.network))

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

    def _open_cache(self, record: ForwardRecord) -> None:
        cache, temperature = self.engine.cache, self.engine.temperature()
        if cache is None:
            return
        if cache.top_k is not None and temperature is None:
            raise AccelError(
                "a cache of the top classes needs one constant temperature",
                "losses with several, or one that changes",
                "use one temperature, or a cache without `top_k`",
            )
        if cache.top_k is not None:
            check_top_classes(self.engine.terms, cache.top_k, self.engine.classes_at)
        views = views_in(self.trainer.train_dataloader)
        self.engine.open_cache(record, views=max((v.views for v in views), default=1))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the student's calls of a step; where it is not known yet, find out who that is."""
        with ExitStack() as stack:
            if not self.ready and not self.sharded:
                listener = Listener(
                    lambda: self.recorder is not None and self.recorder.has_answered()
                )
                self.heard, self.passed = listener.calls, listener.passed
                self._stand(stack, listener)
                self._stand(stack, around_compiled(self.module, listener.aside))
            if self.recorder is not None:
                stack.enter_context(self.recorder.recording())
            else:
                met: list[str] = []
                self._stand(stack, StudentWatcher(self.module, partial(self._meet, met, stack)))
            yield

    def _stand(self, stack: ExitStack, watch: OutermostCalls | Listener) -> None:
        stack.enter_context(watch)
        self._watches.append(watch)
        stack.callback(self._watches.remove, watch)

    def _meet(self, met: list[str], stack: ExitStack, name: str) -> None:
        """Take the first network that a step calls for the student; there must be no second one."""
        if name in met:
            return
        met.append(name)
        if len(met) > 1:
            self.student = None
            raise dry_run.unclear(met)
        self.wire(name)
        assert self.recorder is not None
        stack.enter_context(self.recorder.recording())

    def records(self) -> list[ForwardRecord]:
        """Return the calls of the student in this step that count."""
        if self.recorder is None:
            return []
        found = [record for record in self.recorder.records() if differentiable(record.output)]
        if len(found) > 1 and self.calls == "error" and self.module.automatic_optimization:
            raise AccelError(
                "the student was called several times in one training step",
                f"{len(found)} calls of `{self.name}`",
                "say which count: calls='last', or calls='all' for their mean",
            )
        return found[-1:] if self.calls == "last" else found

    def compute_loss(
        self, task: Tensor, records: list[ForwardRecord], batch: Any, scale: ScaleOf | None = None
    ) -> Tensor:
        """Return the total loss of a step, with the losses of distillation times a factor."""
        with ExitStack() as stack:
            stack.enter_context(among(self.trainer.world_size))
            for watch in reversed(self._watches):
                stack.enter_context(watch.aside())
            return self._compute_loss(task, records, batch, scale)

    def _compute_loss(
        self, task: Tensor, records: list[ForwardRecord], batch: Any, scale: ScaleOf | None
    ) -> Tensor:
        first, known = not self.ready, None
        if first:
            known = self._prepare(records[0], batch, task)
        else:
            self._look_for_left_out(task, records[0], batch)
        moment, factor = self.moment(), 1.0 if scale is None else scale(first)
        loss_output = self.engine.compute_loss(task, records, batch, moment, factor, known)
        self.num_taught += 1
        self._look_for_nan(loss_output)
        self._watch_order(loss_output)
        if self.log_is_due():
            self._note(loss_output)
        if loss_output.outputs is not None and self._weighing_is_due():
            self._weigh(task, loss_output.outputs, moment, factor)
        return loss_output.total

    def _look_for_left_out(self, task: Tensor, record: ForwardRecord, batch: Any) -> None:
        """Look in the first steps of an epoch, and in those that are logged, for what the loss leaves out."""
        if self.engine.reads_loss:
            return
        if self.num_taught >= _EARLY and not self.log_is_due():
            self._unseen += 1
            return
        num = self.engine.look_for_left_out(task, record, batch)
        if num and not self._unseen:
            rank_zero_info(_LEFT_OUT)
        elif num:
            rank_zero_warn(
                explain(
                    "the training step's own loss leaves positions out, and distillation may have counted such before",
                    f"{num} positions in batch {self.batch_idx}, after {self._unseen} steps that were not looked at",
                    "pass `mask=` to leave them out from the beginning; from now on they are",
                )
            )

    def _look_for_nan(self, loss_output: LossOutput) -> None:
        """Raise where losses are no numbers because answers are none; a GPU is not waited for in every step."""
        values = [part.value for name, part in loss_output.parts.items() if name != "task"]
        if loss_output.outputs is None or not values:
            return
        answer = loss_output.outputs.answer
        self._nan = lacks_numbers(answer, values) | self._nan.to(values[0].device)
        if (self._nan.device.type == "cpu" or self.log_is_due()) and bool(self._nan):
            names = [type(teacher.network).__name__ for teacher in self.teachers]
            where = f"batch {self.batch_idx} of epoch {self.trainer.current_epoch}"
            raise not_a_number(answer, names, self.teachers[0].precision, where)

    def _watch_order(self, loss_output: LossOutput) -> None:
        """Keep what the teachers chose for the labels, in the first epoch."""
        outputs, order = loss_output.outputs, self._order
        if order is None or outputs is None or outputs.chosen is None or outputs.target is None:
            return
        if outputs.target.is_floating_point() or outputs.target.shape != outputs.chosen.shape:
            return
        assert outputs.logits is not None
        order.note(outputs.chosen, outputs.target, outputs.labelled, outputs.logits.shape[-1])
        if len(order) == _EARLY and self.trainer.world_size == 1:
            self._judge(order)

    def settle_order(self) -> None:
        """Judge at the end of the first epoch, in all processes, by what was seen in it."""
        order, self._order = self._order, None
        if order is not None:
            with among(self.trainer.world_size):
                self._judge(order)

    def _judge(self, order: diagnostics.ClassOrder) -> None:
        """Raise when the teacher's classes come in another order, and warn once of one that guesses."""
        found = order.verdict(whole=self._compares_classes)
        device = self.trainer.strategy.root_device
        pairs = torch.tensor([*found.moved.items()], dtype=torch.long, device=device)
        moved = dict(all_rows(pairs.view(-1, 2)).tolist())
        diagnostics.refuse_moved(moved, some=not found.guesses)
        if found.guesses:
            self._order = None
            rank_zero_warn(
                explain(
                    "the teacher is hardly better than guessing on the training data",
                    f"{found.right:.1%} right of {found.labels} samples in {found.classes} classes",
                    "pass a trained teacher, and inputs prepared as it knows them",
                )
            )

    def _note(self, loss_output: LossOutput) -> None:
        values = {name: part.value for name, part in loss_output.parts.items()}
        outputs = loss_output.outputs
        if outputs is not None and outputs.logits is not None and outputs.chosen is not None:
            share = 1.0 if outputs.valid is None else share_of_all(outputs.valid)
            values["agreement"] = share * diagnostics.agreement(
                outputs.logits, outputs.chosen, outputs.valid
            )
        self.metrics.note(values)

    def _weighing_is_due(self) -> bool:
        step = self.trainer.global_step
        if self._weighed_at is None and any(teacher.kind == EMA for teacher in self.teachers):
            self._weighed_at = step  # an average that has just begun is the student itself
        recent = (
            self._weighed_at is not None
            and step - self._weighed_at < self.diagnostics_every_n_steps
        )
        return bool(self.diagnostics_every_n_steps) and not recent and not self.sharded

    def _weigh(
        self, task: Tensor, outputs: Outputs, moment: FitProgress, scale: Tensor | float
    ) -> None:
        """Measure each loss's share of the gradient, and warn when the teacher has none."""
        self._weighed_at = self.trainer.global_step
        try:
            shares = dry_run.gradient_shares(
                self.trainer, self.module, self.engine, self.student or "", task, outputs, moment, scale
            )  # fmt: skip
        except AccelError:
            raise
        except Exception as error:  # a network without copies, or a graph that is read only once
            self.diagnostics_every_n_steps = 0
            rank_zero_warn(
                explain(
                    "the losses' shares of the gradient cannot be measured here",
                    f"{type(error).__name__}: {error}",
                    "pass diagnostics_every_n_steps=0",
                )
            )
            return
        self.metrics.shares = shares
        active = [n for n, term in self.engine.terms.items() if term.values(moment)[0] != 0]
        if doubt := diagnostics.without_effect(shares, active):
            rank_zero_warn(doubt)

    def log_is_due(self) -> bool:
        """Tell whether this step's values are to be looked at; the first of each epoch always are."""
        return self.batch_idx % max(self.trainer.log_every_n_steps, 1) == 0  # type: ignore[attr-defined]

    def moment(self) -> FitProgress:
        """Return where the fit is."""
        trainer = self.trainer
        batches = trainer.num_training_batches
        within = self.batch_idx / batches if 0 < batches < float("inf") else 0.0
        epoch = trainer.current_epoch + within
        share = epoch / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0
        if trainer.max_steps > 0:
            share = max(share, trainer.global_step / trainer.max_steps)
        return FitProgress(trainer.global_step, epoch, min(share, 1.0))

    def stand_back(self) -> None:
        """Give the module its methods back."""
        for around in reversed(self.around):
            around.remove()
        self.around = []

    def leave(self) -> None:
        """Give the module its methods back, and take all hooks off."""
        self.stand_back()
        if self.recorder is not None:
            self.recorder.remove()
            self.recorder = None
        for teacher in self.teachers:
            teacher.release()
        if self.engine.cache is not None:
            self.engine.cache.close()
