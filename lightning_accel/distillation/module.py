"""A LightningModule for those who start from two plain networks: the student learns, the teacher helps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from typing_extensions import override

from lightning_accel.arguments import instance, one_of
from lightning_accel.bridge.inert import Onlooker
from lightning_accel.distillation.callbacks.distillation import Distillation
from lightning_accel.distillation.criterion import are_distributions
from lightning_accel.distillation.forward_recorder import ForwardRecord
from lightning_accel.distillation.locate import class_dim_of, classes_last, logits_of
from lightning_accel.distillation.teacher import Source, Teacher
from lightning_accel.errors import AccelError, explain

Interval = Literal["epoch", "step"]
INTERVALS = get_args(Interval)

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
TaskLoss = Callable[[Any, Any], Tensor]


class DistillationModule(LightningModule):
    """Train a plain student with a teacher: fit, validate, test, predict, save and resume.

    The student is the only network within, so that checkpoints hold nothing else; `module.student` is what you
    deploy, and `export` saves its weights. A batch is a pair (inputs, targets) or a mapping of the student's keyword arguments. The
    work is done by a `Distillation` callback that the Trainer gets from `configure_callbacks`.

    Args:
        student: The network that learns.
        teacher: As for `Distillation`; not needed to evaluate.
        losses: As for `Distillation`.
        optimizer: Makes the optimizer of given parameters: a class of torch.optim, or a partial of one.
            AdamW by default.
        scheduler: Makes the learning-rate scheduler of an optimizer.
        interval: When the scheduler steps: "epoch" or "step".
        task_loss: The loss of (output, batch) without a teacher; by default the output's own `.loss`, or the
            cross entropy of the logits with targets that are classes or distributions over them. `None`
            learns from the teacher alone.
        task_weight: Factor of that loss.
        metrics: A metric of torchmetrics, a collection or a mapping, taken of (logits, targets) in
            validation and test, and logged as "val/..." and "test/...".
        settings: Further keywords of `Distillation`.

    Raises:
        TypeError: Student is no module.

    >>> module = DistillationModule(nn.Linear(4, 3), nn.Linear(4, 3), optimizer=torch.optim.SGD)
    >>> sorted(module.state_dict())
    ['student.bias', 'student.weight']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Source | Teacher | Sequence[Source | Teacher] | None = None,
        losses: Any = "kd",
        *,
        optimizer: OptimizerFactory = torch.optim.AdamW,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
        interval: Interval = "epoch",
        task_loss: TaskLoss | str | None = "cross_entropy",
        task_weight: Any = 1.0,
        metrics: Metric | MetricCollection | Mapping[str, Metric] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        instance("student", student, nn.Module, "a network", "pass a torch.nn.Module")
        one_of("interval", interval, INTERVALS)
        do = "pass a class of torch.optim or a partial"
        instance("optimizer", optimizer, Callable, "what makes one", do)
        instance("scheduler", scheduler, Callable, "what makes one", do, none=True)
        if task_loss is not None and task_loss != "cross_entropy" and not callable(task_loss):
            kind = ValueError if isinstance(task_loss, str) else TypeError
            raise kind(
                explain(
                    "unknown `task_loss`", repr(task_loss), "pass a function of output and batch"
                )
            )
        self.student = student
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.interval, self.task_loss = interval, task_loss
        self.metrics = _metrics(metrics)
        self.class_dim = settings.get("class_dim")
        self._distributions_in: Any = None
        settings = {"losses": losses, "task_weight": task_weight, "student": "student", **settings}
        inspect.signature(Distillation).bind(teacher, **settings)  # also without a teacher
        self._held = _Held(None if teacher is None else Distillation(teacher, **settings))

    @property
    def distillation(self) -> Distillation | None:
        """The callback that does the work; `None` without a teacher."""
        return self._held.callback

    @override
    def configure_callbacks(self) -> list[Callback]:
        """Give the Trainer the callback that does the work, before those that edit the model."""
        trained = self.trainer.state.fn == "fit"
        if self.distillation is None and trained:
            raise AccelError("there is no teacher", "teacher=None", "pass one to train")
        return [self.distillation] if self.distillation is not None and trained else []

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.student(*args, **kwargs)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        output = self._call(batch)
        if self.task_loss is None:
            tried = type(vars(self)["_trainer"]) is Onlooker  # a copy that somebody looks at
            if not tried and (self.distillation is None or not self.distillation.teaches):
                raise AccelError(
                    "there is nothing to learn from here",
                    "task_loss=None, and a step outside of a fit with the module's own callback",
                    "call `trainer.fit` with this module, or pass a `task_loss`",
                )
            return torch.zeros((), device=self.device, requires_grad=True)
        loss = self._task(output, batch)
        self.log("train/loss", loss.detach(), batch_size=_size(batch))
        return loss

    @override
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    @override
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self._call(batch)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(self.student.parameters())
        if self.scheduler_factory is None:
            return optimizer
        scheduler = self.scheduler_factory(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]

    def export(self, path: str | Path) -> Path:
        """Save the weights of the student alone, for `student.load_state_dict(torch.load(path))`."""
        torch.save(self.student.state_dict(), path)
        return Path(path)

    def _call(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self.student(**batch)
        if isinstance(batch, (tuple, list)):
            return self.student(batch[0])
        return self.student(batch)

    def _task(self, output: Any, batch: Any) -> Tensor:
        if callable(self.task_loss):
            return self.task_loss(output, batch)
        own = getattr(output, "loss", None)
        if isinstance(own, Tensor):
            return own
        logits, target = logits_of(output), _target(batch)
        if logits is None or logits.dim() < 2 or target is None:
            raise AccelError(
                "the cross entropy needs logits and targets",
                f"an output {type(output).__name__} and a batch {type(batch).__name__}",
                "pass `task_loss=` as a function of output and batch, or None to learn from the teacher",
            )
        return self._cross_entropy(logits, target)

    def _cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return that of classes, one per position or as distributions; refuse other targets."""
        dim = self.class_dim
        if dim is None:
            dim = class_dim_of(logits, target, ForwardRecord((), {}, None, {}))
        if dim is None:
            raise AccelError(
                "the cross entropy cannot tell which dimension of the logits holds the classes",
                f"logits {tuple(logits.shape)} and targets {tuple(target.shape)}",
                "pass class_dim=1 for (batch, classes, ...) or class_dim=-1 for (batch, ..., classes)",
            )
        rows = classes_last(logits, dim)
        whole = not target.is_floating_point() and target.dtype != torch.bool
        if whole and target.shape == rows.shape[:-1]:
            return F.cross_entropy(rows.flatten(0, -2), target.flatten())
        if target.shape != logits.shape or not self._are_distributions(target, dim):
            raise AccelError(
                "the default `task_loss` takes targets for classes",
                f"{target.dtype} targets {tuple(target.shape)} for outputs {tuple(logits.shape)}, which are "
                "neither one class per position nor distributions over classes",
                "pass `task_loss=` as a function of output and batch: binary cross entropy for labels of which "
                "several may be true, a squared error for numbers",
            )
        shares = classes_last(target, dim).flatten(0, -2)
        return F.cross_entropy(rows.flatten(0, -2), shares.to(rows.dtype))

    def _are_distributions(self, target: Tensor, dim: int) -> bool:
        """Tell whether targets are, of the first batch of a stage; to ask at each would wait for the device."""
        stage = self.trainer.state.stage
        if self._distributions_in != stage and are_distributions(target, dim):
            self._distributions_in = stage
        return self._distributions_in == stage

    def _evaluate(self, batch: Any, split: str) -> None:
        output, size = self._call(batch), _size(batch)
        if self.task_loss is not None:
            self.log(
                f"{split}/loss", self._task(output, batch).detach(), batch_size=size, sync_dist=True
            )
        logits, target = logits_of(output), _target(batch)
        if self.metrics is None or logits is None or target is None:
            return
        found: Any = self.metrics[split]
        found.update(logits, target)
        self.log_dict(found, batch_size=size, on_step=False, on_epoch=True)


class _Held:
    """Holds the callback, and with it the teacher, out of the way of copies and parameters."""

    def __init__(self, callback: Distillation | None) -> None:
        self.callback = callback

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        return self


def _metrics(
    metrics: Metric | MetricCollection | Mapping[str, Metric] | None,
) -> nn.ModuleDict | None:
    if metrics is None:
        return None
    known = (Metric, Mapping, MetricCollection)
    instance("metrics", metrics, known, "of torchmetrics", "pass a metric, or a mapping of them")
    if isinstance(metrics, MetricCollection):
        collection = metrics
    else:
        collection = MetricCollection(metrics if isinstance(metrics, Metric) else dict(metrics))
    return nn.ModuleDict({split: collection.clone(prefix=f"{split}/") for split in ("val", "test")})


def _target(batch: Any) -> Tensor | None:
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None


def _size(batch: Any) -> int:
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    return len(first) if isinstance(first, Tensor) else 1
