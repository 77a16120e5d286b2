"""Whether losses on logits suit what student and teacher give: checked on the first batch, before it counts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_accel.distillation import losses
from lightning_accel.distillation.criterion import (
    CLASSES,
    LABELS,
    NUMBERS,
    Usage,
    are_distributions,
)
from lightning_accel.distillation.criterion_gradient import NOTHING, OTHERS
from lightning_accel.distillation.locate import is_whole
from lightning_accel.distillation.loss_term import LossTerm
from lightning_accel.distillation.outputs import IDS, LOGITS, Outputs
from lightning_accel.errors import AccelError, explain
from lightning_accel.exact import exact
from lightning_accel.surgery.call import tensors

_FORMS = {LABELS: "bce", NUMBERS: "mse"}
"""What soft labels are for outputs that are no classes."""
_FEW = 32  # numbers between 0 and 1 that may be so by chance
_BOXES = {"boxes", "bboxes", "bbox", "box"}


def picked(logits: Tensor, classes: Sequence[int]) -> Tensor:
    """Return the teacher's logits of some of its classes, in their order.

    >>> picked(torch.tensor([[5.0, 6.0, 7.0]]), [2, 0])
    tensor([[7., 5.]])
    """
    if max(classes) >= logits.shape[-1]:
        raise AccelError(
            "`Teacher(classes=)` names a class that the teacher does not have",
            f"{max(classes)}, of a teacher with {logits.shape[-1]} classes",
            f"pass for each class of the student the teacher's index of it, from 0 to {logits.shape[-1] - 1}",
        )
    return logits[..., list(classes)]


def suited(terms: Mapping[str, LossTerm], outputs: Outputs, usage: Usage) -> dict[str, LossTerm]:
    """Return the losses, with `kd` for what the user's own criterion takes the outputs for, and a word of it.

    Soft labels are one idea in three forms: of one class out of several, of labels of which several may be true
    (`bce`), and of numbers (`mse`). Only a criterion that was heard decides; a loss that is made for classes stays.

    Args:
        terms: The losses as asked for.
        outputs: The student's first call.
        usage: What the user's criteria take the logits for.
    """
    sure = len(usage.kinds) == 1 and not (usage.soft or usage.beside or usage.class_dim is not None)
    if not sure or outputs.logits is None or _is_penalty(outputs, usage):
        return dict(terms)
    if not usage.others or any(t.numel() != outputs.logits.numel() for t in usage.others):
        return dict(terms)  # boxes beside labels, say
    form = _FORMS.get(next(iter(usage.kinds)))
    found = {}
    for name, term in terms.items():
        found[name] = term
        if form is not None and term.loss is losses.kd:
            found[name] = term.in_form(form)
            warnings.warn(
                explain(
                    f"`{name}` is computed as `{form}`: a softmax would make classes of these outputs",
                    f"a criterion of {next(iter(usage.kinds))} in the training step",
                    f"say '{form}' to have it without this word",
                ),
                stacklevel=2,
            )
    return found


def check_outputs(terms: Mapping[str, LossTerm], outputs: Outputs, usage: Usage) -> None:
    """Raise where a softmax would make classes of what are labels, numbers, or boxes beside classes.

    Args:
        terms: The losses.
        outputs: The student's first call, with or without an answer.
        usage: What the user's criteria take its logits for.
    """
    for name, term in terms.items():
        if term.compares == CLASSES and outputs.logits is not None:
            _refuse_other_outputs(name, outputs, usage)


def account(terms: Mapping[str, LossTerm], outputs: Outputs, usage: Usage) -> str | None:
    """Return what losses of classes take the outputs for where no criterion says it, and why."""
    names = [name for name, term in terms.items() if term.compares == CLASSES]
    if not names or usage.says_something or outputs.given_logits is None:
        return None
    dim = outputs.places.class_dim
    why = (
        "as the gradient of the step's own loss sums to zero along it"
        if usage.rest == CLASSES
        else "as shapes or `class_dim` say, and the step's own loss says nothing"
    )
    return (
        f"No criterion of torch was heard on the student's outputs {tuple(outputs.given_logits.shape)}: `{names[0]}` takes "
        f"dimension {dim} of them for classes, {why}. For labels or numbers say 'bce' or 'mse'."
    )


def check_logits(terms: Mapping[str, LossTerm], outputs: Outputs) -> None:
    """Raise when a loss on logits would compare what is not there, or not comparable.

    Raises:
        AccelError: No logits, other shapes, no telling which dimension holds the classes, or probabilities in
            place of logits.
    """
    needed = {name: term for name, term in terms.items() if term.reads == LOGITS}
    if not needed:
        return
    _require_logits(next(iter(needed)), outputs)
    for name, term in needed.items():
        if term.compares == CLASSES:
            _require_class_dim(name, outputs)
            _refuse_probabilities(name, outputs)
        if term.compares == LABELS:
            _refuse_shares(name, outputs)


def check_top_classes(terms: Mapping[str, LossTerm], top_k: int, class_dim: int | None) -> None:
    """Raise where a cache that keeps the largest logits alone would lose what a loss compares."""
    on_logits = {name: term for name, term in terms.items() if term.reads == LOGITS}
    others = [name for name, term in on_logits.items() if term.compares in (LABELS, NUMBERS)]
    if others:
        raise AccelError(
            "a cache of the top classes holds no labels and no numbers",
            f"top_k={top_k} with the loss `{others[0]}`",
            "use a cache without `top_k`",
        )
    if on_logits and class_dim is None:
        raise AccelError(
            "a cache of the top classes cannot tell which dimension of the logits holds them",
            "no criterion or labels that say it",
            "pass class_dim=1 or class_dim=-1, or a cache without `top_k`",
        )


def warn_of_others(outputs: Outputs, counted: Tensor) -> None:
    """Warn where distillation counts positions of a sequence that the user's own criterion leaves out."""
    if outputs.places.mask is not None or outputs.logits is None or outputs.logits.dim() < 3:
        return
    others = ~counted if outputs.valid is None else outputs.valid & ~counted
    if bool(others.any()):
        warnings.warn(
            explain(
                "distillation counts positions that the training step's own criterion leaves out",
                f"{int(others.sum())} of {others.numel()}",
                "pass `mask=`: a key or an index into the batch, or a function of it",
            ),
            stacklevel=2,
        )


def _require_logits(name: str, outputs: Outputs) -> None:
    student, teacher, ids = outputs.logits, outputs.answer.get(LOGITS), outputs.answer.get(IDS)
    if student is None or teacher is None:
        raise AccelError(
            f"`{name}` needs logits",
            f"the {'student' if student is None else 'teacher'} returns no tensor, or several, of "
            f"shape (batch, ..., classes) within a {type(outputs.record.output).__name__}",
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


def _require_class_dim(name: str, outputs: Outputs) -> None:
    if outputs.places.class_dim is None:
        assert outputs.given_logits is not None
        raise AccelError(
            f"`{name}` cannot tell which dimension of the logits holds the classes",
            f"logits {tuple(outputs.given_logits.shape)}, and no criterion or labels that say it",
            "pass class_dim=1 for (batch, classes, ...) or class_dim=-1 for (batch, ..., classes)",
        )


def _refuse_other_outputs(name: str, outputs: Outputs, usage: Usage) -> None:
    assert outputs.logits is not None
    shape = tuple(outputs.logits.shape)
    if shape[-1] == 1 and outputs.places.class_dim is not None:
        found, what = f"outputs {shape}: one class is always certain", "a single number"
    elif usage.beside and usage.classes is not None:
        found = f"{usage.classes} of {shape[-1]} outputs go into the criterion of classes"
        what = "classes beside other numbers"
    elif CLASSES in usage.kinds or usage.class_dim is not None:
        return
    elif usage.kinds and not usage.soft and not _is_penalty(outputs, usage):
        kinds = " and ".join(sorted(usage.kinds))
        found, what = f"the training step's own criterion takes outputs {shape} for {kinds}", kinds
    elif not usage.kinds and (target := _other_target(outputs)) is not None:
        found = f"targets {tuple(target.shape)} of {target.dtype} whose rows are no distributions"
        what = f"{LABELS} or {NUMBERS}"
    elif not usage.kinds and any(_is_of_rows(box, outputs) for box in _boxes(outputs.batch)):
        found, what = f"boxes in the batch, and outputs {shape}", "classes beside other numbers"
    elif usage.rest == OTHERS and not (usage.kinds and usage.soft) and not _are_shares(outputs):
        found = (
            f"a loss that changes when one number is added to all of a position's outputs {shape}, as it would not "
            "behind a softmax; and no criterion of torch that says more"
        )
        what = f"{LABELS} or {NUMBERS} to the training step"
        if outputs.target is not None and is_whole(outputs.target) and _may_be_classes(outputs):
            warnings.warn(_not_classes(name, what, found), stacklevel=2)  # labels speak for classes
            return
    else:
        return
    raise AccelError(_not_classes(name, what, found))


def _not_classes(name: str, what: str, found: str) -> str:
    return explain(
        f"`{name}` compares classes, and these outputs are {what}",
        found,
        "use 'bce' for labels of which several may be true, 'mse' for numbers; where only some outputs are "
        "classes, name the layers that give those: logits='class_head'; or pass a function of your own",
    )


def _are_shares(outputs: Outputs) -> bool:
    """Tell whether outputs are probabilities, of which there is a word of its own."""
    assert outputs.logits is not None
    return are_distributions(outputs.logits.detach())


def _is_penalty(outputs: Outputs, usage: Usage) -> bool:
    """Tell whether the criteria know nothing of the batch: targets all alike, or beside a class for each position."""
    assert outputs.logits is not None
    if usage.rest == NOTHING and not all(map(_is_constant, usage.others)):
        return False  # they are all there is
    if not all(_over_classes(target, outputs) for target in outputs.of_outputs):
        return False
    given = [t for t in tensors(outputs.batch) if not is_whole(t) or t.dtype == torch.bool]
    if any(_same(target, leaf) for target in usage.others for leaf in given):
        return False
    if outputs.target is not None and is_whole(outputs.target):
        return outputs.target.shape == outputs.logits.shape[:-1]
    return all(map(_is_constant, usage.others))


def _is_constant(target: Tensor) -> bool:
    return bool((target == target.flatten()[:1]).all())


def _same(target: Tensor, given: Tensor) -> bool:
    return target.numel() == given.numel() and torch.equal(
        exact(target).flatten(), exact(given).flatten()
    )


def _other_target(outputs: Outputs) -> Tensor | None:
    """Return a target of the outputs' own shape that is no distribution over classes, if it is the only one."""
    assert outputs.given_logits is not None
    found = (
        [outputs.target]
        if outputs.target is not None and _may_be_classes(outputs)
        else outputs.of_outputs
    )
    alike = (t for t in found if t.shape == outputs.given_logits.shape)
    return next((target for target in alike if not _over_classes(target, outputs)), None)


def _may_be_classes(outputs: Outputs) -> bool:
    """Tell whether labels that were found are numbers of classes, and not of samples, say."""
    if outputs.places.target is not None or outputs.target is None or outputs.labelled is None:
        return True
    assert outputs.logits is not None
    outside = (outputs.target < 0) | (outputs.target >= outputs.logits.shape[-1])
    return not bool((outside & outputs.labelled).any())


def _over_classes(target: Tensor, outputs: Outputs) -> bool:
    dim = outputs.places.class_dim
    return any(are_distributions(target, d) for d in ((1, -1) if dim is None else (dim,)))


def _boxes(node: object) -> list[Tensor]:
    """Return the tensors that a batch calls boxes."""
    if isinstance(node, Mapping):
        named = [v for key, v in node.items() if str(key).lower() in _BOXES]
        return tensors(named) + [box for value in node.values() for box in _boxes(value)]
    return [b for value in node for b in _boxes(value)] if isinstance(node, (list, tuple)) else []


def _is_of_rows(box: Tensor, outputs: Outputs) -> bool:
    """Tell whether there is a box for each row of outputs, or no label that says what else these are."""
    assert outputs.logits is not None
    return outputs.target is None or box.shape[:-1] == outputs.logits.shape[:-1]


def _refuse_probabilities(name: str, outputs: Outputs) -> None:
    assert outputs.logits is not None
    for who, logits in (("student", outputs.logits), ("teacher", outputs.answer[LOGITS])):
        if IDS not in outputs.answer and logits.numel() and are_distributions(logits.detach()):
            raise AccelError(
                f"`{name}` takes the softmax of logits, and the {who} gives probabilities",
                f"outputs {tuple(logits.shape)} that are at least 0 and sum to 1",
                "return what comes before the softmax, or name the layer that gives it: logits='head'",
            )


def _refuse_shares(name: str, outputs: Outputs) -> None:
    assert outputs.logits is not None
    both = outputs.logits.detach(), outputs.answer[LOGITS]
    within = all(bool(((side >= 0) & (side <= 1)).all()) for side in both)
    if within and min(side.numel() for side in both) >= _FEW:
        raise AccelError(
            f"`{name}` takes the sigmoid of logits, and these outputs seem to be probabilities",
            f"outputs {tuple(both[0].shape)}, all between 0 and 1, of student and teacher",
            "return what comes before the sigmoid, or name the layer that gives it: logits='head'",
        )
