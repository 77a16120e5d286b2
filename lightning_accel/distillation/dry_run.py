"""Before the lessons: can this fit be taught at all, which network is called, and what does each loss do?

The user's code runs as often as without us, so all is made ready within the first step. Only where a network is
compiled, or hooks of the user's would see a second backward, the call of the student that was seen is run again, on
a copy without effects on anything (see `bridge.inert`): so a tensor that is changed in place behind a tap is
noticed there too, and shares of the gradient can be measured.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.bridge.inert import inert_copy
from lightning_accel.bridge.restore import load_from_checkpoint
from lightning_accel.bridge.strategies import gathers, holding
from lightning_accel.distillation import diagnostics
from lightning_accel.distillation.criterion import Hearing, Listener
from lightning_accel.distillation.distillation_loss import DistillationLoss
from lightning_accel.distillation.forward_recorder import (
    INPUT,
    ForwardRecord,
    ForwardRecorder,
    layer,
)
from lightning_accel.distillation.outputs import Outputs
from lightning_accel.distillation.schedule import FitProgress
from lightning_accel.distillation.teacher import EMA, SELF, Teacher
from lightning_accel.errors import AccelError, UnsafeFile, Unsupported
from lightning_accel.surgery import Stage, twin
from lightning_accel.surgery.call import tensors
from lightning_accel.surgery.compiled import is_compiled
from lightning_accel.surgery.preserve import preserve_rng

_LONG = 600  # letters of another library's error


def is_sharded(trainer: Trainer) -> bool:
    """Tell whether a strategy shards parameters, so that there is nothing to copy."""
    return holding(trainer.strategy) == "sharded"


def view(batch: Any) -> Any:
    """Return a batch whose containers are our own, so that a step may take things out of it."""
    return tree_map(lambda leaf: leaf, batch)


def static_student(pl_module: LightningModule) -> str:
    """Return the student's name without a rehearsal: the module with a forward, or its only network."""
    if is_overridden("forward", pl_module):
        return ""
    trainable = [n for n, m in pl_module.named_children() if any(True for _ in m.parameters())]
    if len(trainable) != 1:
        raise unclear(trainable)
    return trainable[0]


def refuse_impossible(
    trainer: Trainer, pl_module: LightningModule, engine: DistillationLoss, kinds: set[str]
) -> None:
    """Raise before a fit begins in which nothing could be taught.

    Args:
        trainer: Of the fit.
        pl_module: The user's module.
        engine: Holds the losses and the cache.
        kinds: Of the teachers.

    Raises:
        AccelError: A compiled training step, no prune for teacher='self', a cache of a moving teacher ...
    """
    step = vars(pl_module).get("training_step")
    if getattr(pl_module, "_compiler_ctx", None) or hasattr(step, "_torchdynamo_orig_callable"):
        raise Unsupported(
            "a compiled training step cannot be added to",
            f"torch.compile of {type(pl_module).__name__} or its `training_step`",
            "pass the plain module, and compile the networks inside it or add `BlockCompile()`",
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise Unsupported(
            "a training step that draws its own batches cannot be rehearsed",
            "training_step(self, dataloader_iter)",
            "take `batch` as its argument",
        )
    edits = [c for c in trainer.callbacks if getattr(c, "stage", None) == Stage.SHAPE]  # type: ignore[attr-defined]
    if SELF in kinds and not edits:
        raise AccelError(
            "teacher='self' is the network before a prune, and nothing prunes here",
            "no StructuredPruning among the callbacks",
            "add one, or pass a trained teacher, or 'ema'",
        )
    moving = {EMA} if gathers(trainer.strategy) else {SELF, EMA}
    if kinds & moving and is_sharded(trainer):
        raise Unsupported(
            "teacher='self' and 'ema' need whole parameters on every process"
            if SELF in moving
            else "teacher='ema' needs whole parameters on every process after each step",
            type(trainer.strategy).__name__,
            "pass a trained teacher, or train with strategy='ddp'",
        )
    if EMA in kinds and engine.cache is not None:
        raise AccelError(
            "what a moving teacher says cannot be cached",
            "teacher='ema' with a cache",
            "drop one of the two",
        )
    tensor_parallel = getattr(trainer.strategy, "_tensor_parallel_size", 1)
    if tensor_parallel not in (1, "auto") and any(
        term.across_rows for term in engine.terms.values()
    ):
        raise Unsupported(
            "losses over all rows of a batch do not know tensor parallelism",
            type(trainer.strategy).__name__,
            "use a loss of single rows, such as 'kd' or 'fitnet'",
        )


def searches(trainer: Trainer) -> bool:
    """Tell whether the fit begins with trials of Lightning's tuners, in which it runs no other callback."""
    finders = LearningRateFinder, BatchSizeFinder
    return any(isinstance(callback, finders) for callback in trainer.callbacks)  # type: ignore[attr-defined]


class Rerun(NamedTuple):
    """A copy of the student, its answer to the arguments of a call, and the criteria that it called itself."""

    student: nn.Module
    record: ForwardRecord
    hearing: Hearing


@contextmanager
def rerun(
    trainer: Trainer,
    pl_module: LightningModule,
    engine: DistillationLoss,
    name: str,
    record: ForwardRecord,
) -> Iterator[Rerun]:
    """Run a call of the student once more, on a copy and without compiled code; random states come back."""
    eager = torch.compiler.set_stance("force_eager")
    with preserve_rng(), eager, _copy_of(trainer, pl_module, name) as student:
        args, kwargs = tree_map(_apart, (record.args, record.kwargs))
        recorder = ForwardRecorder(student, engine.student_taps())
        try:
            with (
                recorder.recording(),
                torch.enable_grad(),
                Listener(recorder.has_answered) as listener,
            ):
                student(*args, **kwargs)
            # Labels are told from inputs by identity.
            heard = recorder.records()[-1]._replace(args=record.args, kwargs=record.kwargs)
            yield Rerun(student, heard, Hearing(heard, listener.calls))
        finally:
            recorder.remove()


@contextmanager
def _copy_of(trainer: Trainer, pl_module: LightningModule, name: str) -> Iterator[nn.Module]:
    student = layer(pl_module, name)
    if isinstance(student, LightningModule):  # which may log, and knows its Trainer
        with inert_copy(trainer, student) as copy:
            yield copy
    else:
        yield twin(student)


def _apart(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def refuse_without_gradient(student: nn.Module, record: ForwardRecord) -> None:
    """Raise when a layer that learns gave a tensor from which no gradient comes back to it."""
    for name, tapped in record.taps.items():
        if name.endswith(INPUT) or tapped.requires_grad:
            continue
        if any(parameter.requires_grad for parameter in layer(student, name).parameters()):
            raise AccelError(
                f"no gradient comes back through the tapped layer `{name}`, so its loss would teach nothing",
                "it runs under `no_grad`, as within `torch.utils.checkpoint.checkpoint(use_reentrant=True)`",
                "pass `use_reentrant=False` there, or tap the checkpointed block as a whole, or a layer outside",
            )


def gradient_shares(
    trainer: Trainer,
    pl_module: LightningModule,
    engine: DistillationLoss,
    name: str,
    task: Tensor,
    outputs: Outputs,
    moment: FitProgress,
    scale: Tensor | float = 1.0,
) -> dict[str, float]:
    """Return each term's share of the gradient on the student, the user's own loss as "task".

    Measured on the graph of the step itself. Where that cannot be, what the user's loss asks of the student's
    output is read from the part of the graph above it, and all below is computed on a copy.
    """
    record, student = outputs.record, layer(pl_module, name)
    if not (is_compiled(student) or _watches_backward(student)):
        with suppress(
            RuntimeError
        ):  # a reentrant checkpoint has no gradients but those of `backward`
            return diagnostics.shares(
                engine.weighted(task, record, outputs.answer, outputs.batch, moment, scale), student
            )
    results = [tensor for tensor in tensors(record.output) if tensor.requires_grad]
    asked = torch.autograd.grad(task, results, retain_graph=True, allow_unused=True)
    with rerun(trainer, pl_module, engine, name, record) as (copy, heard, _), torch.enable_grad():
        given = [tensor for tensor in tensors(heard.output) if tensor.requires_grad]
        alike = zip(asked, given, strict=True)
        parts = [
            (gradient.detach() * output).sum() for gradient, output in alike if gradient is not None
        ]
        surrogate = torch.stack(parts).sum() if parts else None
        return diagnostics.shares(
            engine.weighted(surrogate, heard, outputs.answer, outputs.batch, moment, scale), copy
        )


def _watches_backward(student: nn.Module) -> bool:
    """Tell whether hooks would see a backward that is none of the fit's."""
    on_modules = any(m._backward_hooks or m._backward_pre_hooks for m in student.modules())
    return on_modules or any(p._backward_hooks for p in student.parameters())


def load_teacher(teacher: Teacher, pl_module: LightningModule) -> nn.Module:
    """Return the network that a module or a path stands for, with its weights.

    Raises:
        AccelError: The file does not fit the class.
    """
    if isinstance(teacher.source, nn.Module):
        if teacher.checkpoint is not None:
            teacher.load_weights()
        return teacher.source
    path = teacher.source
    try:
        with preserve_rng():  # its first weights are drawn, and then replaced
            return load_from_checkpoint(type(pl_module), path, map_location="cpu")
    except FileNotFoundError as error:
        raise AccelError(
            "there is no such checkpoint of the teacher", str(path), "train it first"
        ) from error
    except UnsafeFile as error:
        raise UnsafeFile(
            f"the teacher cannot be made from its checkpoint alone: {error}",
            do="then pass Teacher(module, checkpoint='weights.pt'); in yaml, `teacher: {_target_: "
            "lightning_accel.Teacher, source: ${model}, checkpoint: weights.pt}`",
        ) from None
    except Exception as error:
        raise AccelError(
            f"the teacher's checkpoint is not one of {type(pl_module).__name__}",
            f"{path}: {type(error).__name__}: {' '.join(str(error).split())[:_LONG]}",
            "pass Teacher(module, checkpoint=path) with a module of the right class and size",
        ) from error


def entry(network: nn.Module, name: str, pl_module: LightningModule) -> nn.Module:
    """Return the part of a teacher that gets the student's arguments.

    A LightningModule of the student's own class is called where the student is; any other one by its own
    `forward`, which may prepare the inputs, and without one where the student is.
    """
    if not isinstance(network, LightningModule):
        return network
    alike = isinstance(network, type(pl_module)) or isinstance(pl_module, type(network))
    if is_overridden("forward", network) and not (alike and name):
        return network
    if name:
        try:
            return layer(network, name)
        except AccelError:
            pass
    if is_overridden("forward", network):
        return network
    return layer(network, static_student(network))


def class_names(*holders: Any) -> list[str] | None:
    """Return the names of the classes where one of the holders tells them, in order of their index.

    Read are `class_names`, `classes`, `class_to_idx`, and `config.id2label` of transformers.
    """
    for holder in holders:
        for name in ("class_names", "classes"):
            found: Any = getattr(holder, name, None)
            listed = isinstance(found, (list, tuple)) and len(found) > 0
            if listed and all(isinstance(item, str) for item in found):
                return list(found)
        places = getattr(holder, "class_to_idx", None)
        if isinstance(places, dict) and places:
            return sorted(places, key=lambda key: places[key])
        labels: Any = getattr(getattr(holder, "config", None), "id2label", None)
        named = isinstance(labels, dict) and len(labels) > 0
        if named and not all(str(v).startswith("LABEL_") for v in labels.values()):
            return [str(labels[key]) for key in sorted(labels)]
    return None


def unclear(names: Sequence[str]) -> AccelError:
    """Return the error that says that several networks could be the student."""
    return AccelError(
        "it is not clear which network is the student",
        f"{len(names)} networks that are called one after another: " + ", ".join(names[:6]),
        "name it: student='net'; call `self(x)` rather than `self.forward(x)`",
    )
