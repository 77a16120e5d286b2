"""When a student learns from a teacher: within the user's own training step, whose loss it adds to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from typing_extensions import override

from lightning_accel.arguments import instance, one_of, open_share, path, whole
from lightning_accel.bridge import checks
from lightning_accel.bridge.restore import averages, pristine
from lightning_accel.bridge.step import Around
from lightning_accel.bridge.strategies import whole as made_whole
from lightning_accel.bridge.technique import Technique
from lightning_accel.distillation import dry_run, heads
from lightning_accel.distillation.arguments import index_of
from lightning_accel.distillation.cache import TeacherCache
from lightning_accel.distillation.distillation_loss import DistillationLoss
from lightning_accel.distillation.distributed import among, average_gradients
from lightning_accel.distillation.fit_state import FitState
from lightning_accel.distillation.locate import Where, check_where
from lightning_accel.distillation.loss_term import loss_terms
from lightning_accel.distillation.manual_steps import ManualSteps
from lightning_accel.distillation.metrics import DistillationMetrics
from lightning_accel.distillation.optimizers import part
from lightning_accel.distillation.schedule import read, require_some
from lightning_accel.distillation.teacher import (
    EMA,
    SELF,
    Source,
    Teacher,
    read_teachers,
    shares_parameters,
)
from lightning_accel.distillation.views import views_in
from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.surgery import Receipt, Structure, twin

Calls = Literal["error", "last", "all"]
CALLS = get_args(Calls)


class Distillation(Technique):
    """Let the network inside a LightningModule learn from a teacher, in the training step it has.

    The student's logits and features are tapped in the one forward that happens anyway; the teacher runs
    on the very arguments that the student got, after augmentation and mixup; not after what the student's own `forward`
    does to them (to augment there, name the network inside: `student="net"`). The loss of `training_step`
    becomes `task_weight` times that loss plus the weighted losses of distillation; under manual optimization, what
    is done to the criterion on its way to `manual_backward` (`loss / 4`) is done to these as well. What is logged by
    the user stays the user's. Projectors between features of different sizes are made on the first batch,
    trained by the student's optimizer, kept on resume, and are no part of the module.

    Args:
        teacher: A trained module (with the student's arguments), a LightningModule, the path of a
            checkpoint of the student's class, a `Teacher`, or a list of them; "self" is the un-pruned
            network in the same fit as a prune, "ema" the moving average of the student.
        losses: A name such as "kd", a list, or a mapping of names to weights or keywords of `Term`.
        task_weight: Factor of the user's own loss. A number, a `Schedule`, or a function of the `Moment`.
        student: The name of the student's network; by default the one that `training_step` calls.
        logits: Layers whose outputs are the logits, "head: fc"; by default what the networks return.
        class_dim: Their dimension that holds the classes, 1 for maps (B, C, H, W); by default the one that your
            criterion or the labels' shape tells.
        target: Key or index of the labels in the batch, or a function of it; found where it is clear.
        mask: Likewise of the positions that count, for sequences.
        calls: Of several calls of the student in a step: "error", "last", or the mean of "all".
        cache: A folder, or a `TeacherCache`, for what the teacher said to inputs that come again.
        ema_decay: Of teacher="ema".
        diagnostics_every_n_steps: Steps between two measurements of each loss's share of the gradient; 0 is never.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.

    >>> Distillation(nn.Linear(2, 2), {"kd": {"weight": 0.9, "temperature": 4.0}}, task_weight=0.1).calls
    'error'
    """

    def __init__(
        self,
        teacher: Source | Teacher | Sequence[Source | Teacher],
        losses: Any = "kd",
        *,
        task_weight: Any = 1.0,
        student: str | None = None,
        logits: Any = None,
        class_dim: int | None = None,
        target: Where = None,
        mask: Where = None,
        calls: Calls = "error",
        cache: str | Path | TeacherCache | None = None,
        ema_decay: float = 0.999,
        diagnostics_every_n_steps: int = 200,
    ) -> None:
        self.teachers = read_teachers(teacher)
        self.calls = one_of("calls", calls, CALLS)
        self.ema_decay = open_share("ema_decay", ema_decay)
        self.diagnostics_every_n_steps = whole(
            "diagnostics_every_n_steps", diagnostics_every_n_steps, least=0
        )
        self.student = instance(
            "student", student, str, "a name", "pass text, or leave it out", none=True
        )
        if cache is not None and not isinstance(cache, TeacherCache):
            cache = TeacherCache(path("cache", cache))
        self.engine = DistillationLoss(
            loss_terms(losses),
            task_weight=read(task_weight, "task_weight"),
            logits=logits,
            class_dim=index_of("class_dim", class_dim),
            target=check_where(target, "target"),
            mask=check_where(mask, "mask"),
            cache=cache,
        )
        require_some(self.engine.task_weight, *(t.weight for t in self.engine.terms.values()))
        self.metrics = DistillationMetrics()
        self.average: AveragedModel | None = None  # an attribute, so that prunes reach it
        self._loaded: dict[str, Any] = {}
        self._averaged_step = 0
        self._course: FitState | None = None
        self._by_hand: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_course": None, "_by_hand": None}  # no fit is under way

    @property
    def shares(self) -> dict[str, float]:
        """The last measured share (0 to 1) of each loss in the gradient; the user's own is "task"."""
        return dict(self.metrics.shares)

    @property
    def teaches(self) -> bool:
        """Whether the steps of a module are taught at the moment."""
        return self._course is not None and bool(self._course.around)

    # --- before the first step ----------------------------------------------------------------------

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        dry_run.refuse_impossible(
            trainer, pl_module, self.engine, {teacher.kind for teacher in self.teachers}
        )
        again = self._course is not None and self._course.is_of(trainer, pl_module)
        self._begin(trainer, pl_module)
        self._loaded, self.average = {}, None
        for teacher in self.teachers:
            if teacher.kind == SELF and not again:
                teacher.forget()
            if teacher.kind in ("module", "path"):
                teacher.network = dry_run.load_teacher(teacher, pl_module)
                if shares_parameters(teacher.network, pl_module):
                    raise AccelError(
                        "student and teacher share parameters",
                        "one and the same network, or parts of it",
                        "pass copy.deepcopy(network) as teacher, or teacher='ema'",
                    )
        if dry_run.searches(trainer):  # with no callback but its own, and before ours has begun
            if any(teacher.kind == EMA for teacher in self.teachers):
                self._set_average(trainer, pl_module, None)
            self._stand_around(pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a course, with nothing of one before."""
        self._course = FitState(
            trainer,
            pl_module,
            engine=self.engine,
            teachers=self.teachers,
            metrics=self.metrics,
            calls=self.calls,
            diagnostics_every_n_steps=self.diagnostics_every_n_steps,
        )
        self.held(trainer).callback(self._course.leave)
        self._course.student = self.student
        self.engine.heads = nn.ModuleDict()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back what a checkpoint holds, before the optimizers' state comes back."""
        checks.refuse_lazy(pl_module, type(self).__name__)
        fit_state = self._of_this_fit()
        state, self._loaded = self._loaded, {}
        fit_state.student = state.get("student") if self.student is None else self.student
        if any(teacher.kind == EMA for teacher in self.teachers):
            self._set_average(trainer, pl_module, state.get("ema"))
        if SELF in state:
            with made_whole(trainer):
                network = twin(pl_module)
            Structure.from_dict(state[SELF]["structure"]).apply(network)
            network.load_state_dict(state[SELF]["weights"])
            self._keep(network)
        if "heads" in state:
            heads.load(self.engine, state["heads"], trainer.strategy.root_device)
            fit_state.join()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._averaged_step = trainer.global_step
        self._tell_views(trainer)
        self._stand_around(pl_module)

    def _stand_around(self, pl_module: LightningModule) -> None:
        """Take part in the module's steps from now on."""
        fit_state = self._of_this_fit()
        fit_state.stand_back()
        # The module's own hook comes after those of all callbacks, and so after a prune.
        work: list[tuple[str, Any]] = [
            ("on_train_batch_start", self._before_step),
            ("zero_grad", self._zero_grad),
        ]
        if pl_module.automatic_optimization:
            work += [("training_step", self._step)]
        else:
            self._by_hand = ManualSteps(fit_state)
            work += [("training_step", self._manual_step), ("manual_backward", self._backward)]
        fit_state.around = [Around(pl_module, name, method) for name, method in work]

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell_views(trainer)

    def _zero_grad(self, method: Any, set_to_none: bool = True) -> None:
        """Stand around the module's `zero_grad`, which knows nothing of projectors."""
        method(set_to_none)
        self.engine.heads.zero_grad(set_to_none)

    def _before_step(self, method: Any, batch: Any, batch_idx: int) -> Any:
        """Stand around the module's `on_train_batch_start`: get everything ready for the step."""
        result, fit_state = method(batch, batch_idx), self._of_this_fit()
        if result != -1 and not self._waits():  # -1: the rest of the epoch is left out
            fit_state.get_ready(batch, batch_idx)
        return result

    # --- within the step ----------------------------------------------------------------------------

    def _step(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand around `training_step` of automatic optimization."""
        fit_state = self._of_this_fit()
        if self._waits():
            return method(*args, **kwargs)
        batch = dry_run.view(_batch(args, kwargs))
        with fit_state.recording():
            output = method(*args, **kwargs)
        task = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(task, Tensor):
            return output  # the user skips this batch
        records = fit_state.records()
        if not records:
            raise NoEffect(
                "the student was not called in this training step",
                f"`{fit_state.name}`: no output that carries a gradient",
                "call it as a module (not `.forward`) outside of `no_grad`, or name another `student=`",
            )
        total = fit_state.compute_loss(task, records, batch)
        return {**output, "loss": total} if isinstance(output, Mapping) else total

    def _manual_step(self, method: Any, *args: Any, **kwargs: Any) -> Any:
        """Stand around `training_step` of manual optimization, whose losses go to `manual_backward`."""
        if self._waits():
            return method(*args, **kwargs)
        return self._by_hand.step(method, _batch(args, kwargs), *args, **kwargs)

    def _backward(self, method: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stand around `manual_backward`."""
        if self._waits():
            return method(loss, *args, **kwargs)
        return self._by_hand.backward(method, loss, *args, **kwargs)

    # --- after it -----------------------------------------------------------------------------------

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with among(trainer.world_size):
            average_gradients(list(self.engine.heads.parameters()))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        fit_state = self._of_this_fit()
        if fit_state.recorder is not None:
            fit_state.recorder.clear()
        fit_state.heard, fit_state.passed = [], []
        if self.average is not None and trainer.global_step != self._averaged_step:
            self._averaged_step = trainer.global_step
            self.average.update_parameters(pl_module)
        if fit_state.log_is_due() and trainer.loggers:
            values = self.metrics.latest(self.engine.cache)
            for logger in trainer.loggers if values else ():
                logger.log_metrics(values, step=max(trainer.global_step - 1, 0))

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fit_state = self._of_this_fit()
        if fit_state.could_teach and not fit_state.num_taught:
            raise NoEffect(
                "in a whole epoch no loss hung on the student's output",
                f"student `{fit_state.name}`",
                "give `self.manual_backward` a loss of the student, or name another `student=`",
            )
        fit_state.num_taught, fit_state.could_teach = 0, False
        if not fit_state.ready:
            return
        fit_state.settle_order()
        for teacher in self.teachers:
            teacher.check_buffers()
        means = {} if trainer.barebones else self.metrics.close_epoch(self.engine.cache)
        for name, value in means.items():
            pl_module.log(name, value, sync_dist=trainer.world_size > 1)
        reason = None if self.engine.cache is None else self.engine.cache.end_epoch()
        if reason is not None:
            rank_zero_warn(reason)

    # --- beside prunes ------------------------------------------------------------------------------

    @override
    def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the network as it is before the first prune, for teacher='self'."""
        if any(teacher.kind == SELF and not teacher.has_network for teacher in self.teachers):
            network = twin(pl_module)
            for buffer in network.buffers() if trainer.world_size > 1 else ():
                torch.distributed.broadcast(buffer, 0)  # between forwards each process has its own
            self._keep(network)

    @override
    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Make all ready anew, for the new shape, within the next step."""
        fit_state = self._of_this_fit()
        dense = pristine(pl_module)
        if dense.now(pl_module) == dense:  # the first prune was taken back: nobody smaller is there
            for teacher in (t for t in self.teachers if t.kind == SELF):
                teacher.forget()
        fit_state.edit, fit_state.ready = fit_state.edit + receipt, False

    def _waits(self) -> bool:
        """Tell whether there is no teacher yet: before the first prune, with teacher='self'."""
        return any(t.kind == SELF and not t.has_network for t in self.teachers)

    def _keep(self, network: nn.Module) -> None:
        for teacher in self.teachers:
            if teacher.kind == SELF:
                teacher.network = network

    # --- checkpoints and the end --------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        if self._course is not None and self._course.student is not None:
            state["student"] = self._course.student
        if len(self.engine.heads):
            state["heads"] = heads.state(self.engine)
        if self.average is not None:
            state["ema"] = self.average.state_dict()
        for teacher in self.teachers:
            if teacher.kind == SELF and teacher.has_network:
                structure = Structure.of(teacher.network).to_dict()
                state[SELF] = {"structure": structure, "weights": teacher.network.state_dict()}
        return state

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put all back after a search for a learning rate or a batch size, which may begin in mid-training too."""
        fit_state = self._course
        if fit_state is None or not fit_state.around or trainer.state.fn != "fit":
            return
        state = checkpoint["callbacks"].get(self.state_key, {})
        if self.average is not None and "ema" in state:
            self.average.load_state_dict(state["ema"])
        if "heads" in state:  # they were there before
            self.engine.heads.load_state_dict(state["heads"]["weights"])
            return
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        part(trainer.optimizers, schedulers, self.engine.heads.parameters())
        fit_state.leave()
        self._begin(trainer, pl_module)
        self._stand_around(pl_module)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.leave(trainer)

    def _of_this_fit(self) -> FitState:
        assert self._course is not None, "`setup` comes first"
        return self._course

    def _set_average(self, trainer: Trainer, pl_module: LightningModule, state: Any) -> None:
        """Take the average of another callback where there is one, or else begin our own."""
        self.average = None
        # Not those of StochasticWeightAveraging, which begin late and are filled rarely.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others: list[Callback] = [c for c in callbacks if isinstance(c, WeightAveraging)]
        network = next(averages(others, pl_module), None)
        if network is None:
            rule = _Rule(self.ema_decay)
            self.average = AveragedModel(twin(pl_module), multi_avg_fn=rule, use_buffers=True)
            if state is not None:
                self.average.load_state_dict(state)
            network = self.average.module
        for teacher in self.teachers:
            if teacher.kind == EMA:
                teacher.network = network

    def _tell_views(self, trainer: Trainer) -> None:
        for views in views_in(trainer.train_dataloader):
            views.set_epoch(trainer.current_epoch)


class _Rule:
    """Torch's rule of a moving average, in a form that pickles."""

    def __init__(self, decay: float) -> None:
        self.decay = decay

    def __call__(self, *args: Any) -> None:
        get_ema_multi_avg_fn(self.decay)(*args)


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)
