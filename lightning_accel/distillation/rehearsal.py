"""The first step on a copy, before the real one: who is the student, and does all fit together?

A copy of the module without effects on anything (see `bridge.example`) runs the user's training step on
the first batch. So every error comes before the first step, a tensor that is changed in place behind a
tap is noticed even where the real network is compiled, and a share of the gradient can be measured
without a second backward through the real graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.bridge.data import ReadOnce, batches
from lightning_accel.bridge.example import (
    outermost_calls,
    placed,
    run_placed,
)
from lightning_accel.bridge.inert import inert_copy
from lightning_accel.bridge.restore import load_from_checkpoint
from lightning_accel.distillation import evidence
from lightning_accel.distillation.criterion import LABELS, NUMBERS, Heard, Listener
from lightning_accel.distillation.engine import Engine
from lightning_accel.distillation.schedule import Moment
from lightning_accel.distillation.seen import LOGITS, Answer
from lightning_accel.distillation.steps import differentiable
from lightning_accel.distillation.tape import INPUT, Record, Tape, layer
from lightning_accel.distillation.teacher import Teacher
from lightning_accel.errors import AccelError, UnsafeFile, explain
from lightning_accel.surgery.call import Call
from lightning_accel.surgery.preserve import preserve_rng

_BATCHES = 16  # to tell classes in another order from a teacher that knows nothing


@contextmanager
def stage(trainer: Trainer, pl_module: LightningModule) -> Iterator[LightningModule]:
    """Give a copy to rehearse on, without compiled code, and put the random state back."""
    eager = torch.compiler.set_stance("force_eager")
    with preserve_rng(), eager, inert_copy(trainer, pl_module) as copy:
        yield copy


def is_sharded(trainer: Trainer) -> bool:
    """Tell whether a strategy shards parameters, so that there is nothing to copy."""
    return not isinstance(trainer.strategy, (DDPStrategy, SingleDeviceStrategy))


def find_student(trainer: Trainer, copy: LightningModule, batch: Any, batch_idx: int) -> str | None:
    """Return the name of the one network that `training_step` calls; "" is the module itself.

    `None` is no call, as when a user skips the batch.
    """
    calls = outermost_calls(trainer, copy, deepcopy(batch), batch_idx)
    return _only(calls) if calls else None


def view(batch: Any) -> Any:
    """Return a batch whose containers are our own, so that a step may take things out of it."""
    return tree_map(lambda leaf: leaf, batch)


class Rehearsed(NamedTuple):
    """The student's call on a copy, the user's loss where there is one, the batch as it was, and criteria."""

    record: Record
    task: Tensor | None
    batch: Any
    heard: list[Heard]


def static_student(pl_module: LightningModule) -> str:
    """Return the student's name without a rehearsal: the module with a forward, or its only network."""
    if is_overridden("forward", pl_module):
        return ""
    trainable = [n for n, m in pl_module.named_children() if any(True for _ in m.parameters())]
    return _only([Call(name, (), {}) for name in trainable])


def record_on(
    trainer: Trainer,
    copy: LightningModule,
    engine: Engine,
    name: str,
    batch: Any,
    batch_idx: int,
    calls: str,
) -> Rehearsed | None:
    """Run the step on copies of module and batch; `None` when the user skips this batch."""
    losses: list[Any] = []
    own = deepcopy(batch)  # a step may change its batch
    before = view(own)
    vars(copy)["manual_backward"] = lambda loss, *_, **__: losses.append(loss)
    tape = Tape(layer(copy, name), engine.student_taps())
    try:
        with tape.recording(), Listener(tape.has_answered) as listener:
            output = run_placed(trainer, copy, own, batch_idx)
        found = [record for record in tape.records() if differentiable(record.output)]
    finally:
        tape.remove()
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if losses:
        loss = losses[-1]
    if not found and loss is None:
        return None
    if not found:
        raise AccelError(
            "the student was not called in the first training step",
            f"no call of `{name or type(copy).__name__}` whose output carries a gradient",
            "call it as a module (not `.forward`) outside of `no_grad`, or name another `student=`",
        )
    if len(found) > 1 and calls == "error" and copy.automatic_optimization:
        raise AccelError(
            "the student was called several times in one training step",
            f"{len(found)} calls of `{name or type(copy).__name__}`",
            "say which count: calls='last', or calls='all' for their mean",
        )
    _refuse_without_gradient(layer(copy, name), found[-1])
    task = loss if isinstance(loss, Tensor) else None
    return Rehearsed(found[-1], task, before, listener.calls)


def _refuse_without_gradient(student: nn.Module, record: Record) -> None:
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


def check_classes(
    trainer: Trainer,
    copy: LightningModule,
    engine: Engine,
    name: str,
    record: Record,
    answer: Answer,
    batch: Any,
) -> None:
    """Raise when the teacher's classes come in another order, and warn when it knows nothing."""
    on_logits = (term for term in engine.terms.values() if term.reads == LOGITS)
    if all(term.compares in (LABELS, NUMBERS) for term in on_logits):
        return
    own = class_names(copy, layer(copy, name), trainer.datamodule)  # type: ignore[attr-defined]
    for teacher in engine.teachers:
        if teacher.classes is None:
            evidence.check_names(own, class_names(teacher.network))
    found = _chosen(engine, record, answer, batch)
    if found is None or not evidence.is_at_chance(*found):
        return
    chosen, target, num_classes = [found[0]], [found[1]], found[2]
    for index, other in enumerate(_more(trainer)):
        moved = placed(trainer, copy, other)
        again = record_on(trainer, copy, engine, name, moved, index, "last")
        if again is None:
            continue
        more = _chosen(engine, again.record, engine.run(again.record), again.batch)
        if more is not None:
            chosen.append(more[0])
            target.append(more[1])
    choices, labels = torch.cat(chosen), torch.cat(target)
    evidence.check_order(choices, labels)
    if evidence.is_at_chance(choices, labels, num_classes):
        right = float((choices == labels).float().mean())
        rank_zero_warn(
            explain(
                "the teacher is hardly better than guessing on the training data",
                f"{right:.1%} right of {len(labels)} samples in {num_classes} classes",
                "pass a trained teacher, and inputs prepared as it knows them",
            )
        )


def _more(trainer: Trainer) -> list[Any]:
    """Return other batches; none of data that can be read only once."""
    try:
        return batches(trainer, _BATCHES)
    except ReadOnce:
        return []


def gradient_shares(
    trainer: Trainer,
    pl_module: LightningModule,
    engine: Engine,
    name: str,
    batch: Any,
    batch_idx: int,
    calls: str,
    moment: Moment,
) -> dict[str, float]:
    """Return each term's share of the gradient on the student, the user's own loss as "task".

    Empty when the user skips this batch.
    """
    with stage(trainer, pl_module) as copy:
        found = record_on(trainer, copy, engine, name, batch, batch_idx, calls)
        if found is None or (found.task is None and not copy.automatic_optimization):
            return {}  # a step without a loss, or one whose backward we cannot see
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            weighted = engine.weighted(found.task, found.record, found.batch, moment)
        return evidence.shares(weighted, layer(copy, name))


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
            f"{path}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            "pass Teacher(module, checkpoint=path) with a module of the right class and size",
        ) from error


def entry(network: nn.Module, name: str) -> nn.Module:
    """Return the part of a teacher that gets the student's arguments."""
    if not isinstance(network, LightningModule):
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


def _chosen(
    engine: Engine, record: Record, answer: Answer, batch: Any
) -> tuple[Tensor, Tensor, int] | None:
    """Return the teacher's classes, the labels, and how many classes there are."""
    seen = engine.see(record, answer, batch)
    if seen.logits is None or seen.chosen is None or seen.target is None:
        return None
    if seen.target.is_floating_point() or seen.target.shape != seen.chosen.shape:
        return None
    assert seen.labelled is not None
    labelled = seen.labelled & (seen.target >= 0)
    return seen.chosen[labelled], seen.target[labelled], seen.logits.shape[-1]


def _only(calls: Sequence[Call]) -> str:
    if len(calls) != 1:
        raise AccelError(
            "it is not clear which network is the student",
            f"{len(calls)} networks that are called one after another: "
            + ", ".join(call.name for call in calls[:6]),
            "name it: student='net'; call `self(x)` rather than `self.forward(x)`",
        )
    return calls[0].name
