"""Whether distillation does anything: agreement, shares of the gradient, and classes in another order.

A distillation without effect looks like any other training: the loss falls, only nothing is learned from
the teacher. So three numbers are measured on the user's own data. *Agreement* is how often student and
teacher choose the same class. A term's *share* is the norm of its gradient on the student's parameters,
weighted, divided by the sum of those norms over all terms and the user's own loss. And where there are labels,
what the teacher answers for each of them tells whether its classes come in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, explain
from lightning_accel.exact import exact

NO_EFFECT = 1e-3
"""Below this share of the gradient, the teachers have no effect."""

_SEEN = 5  # samples of a class before anything is said about it
_LEAST = 3  # likewise, of classes that go round in a circle, where the teacher knows the others
_SURE = 0.8  # of a class's samples, where the teacher is right about others
_KNOWS = 0.9
_STEPS = 64
_POSITIONS = 4096  # of each step


def agreement(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the share (0 to 1) of positions at which both choose the same class.

    Args:
        student: (..., C).
        teacher: Likewise; or the teacher's classes (...) as integers.
        mask: (...), which positions count.

    >>> agreement(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    tensor(0.5000)
    """
    chosen = teacher.argmax(-1) if teacher.is_floating_point() else teacher
    same = (student.argmax(-1) == chosen).float()
    if mask is None:
        return same.mean()
    return (same * mask).sum() / mask.sum().clamp(min=1)


def shares(terms: Mapping[str, Tensor], network: nn.Module) -> dict[str, float]:
    """Return each weighted term's share (0 to 1) of the gradient on the parameters of a network.

    Args:
        terms: Weighted losses on one graph, which is kept.
        network: Its trainable parameters count.

    >>> net = nn.Linear(1, 1, bias=False)
    >>> shares({"one": net.weight.sum(), "three": 3 * net.weight.sum()}, net)
    {'one': 0.25, 'three': 0.75}
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    norms = {}
    for name, term in terms.items():
        if not term.requires_grad:
            norms[name] = 0.0
            continue
        found = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
        squares = [exact(g).square().sum() for g in found if g is not None]
        norms[name] = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    whole = sum(norms.values())
    return {name: norm / whole if whole > 0 else 0.0 for name, norm in norms.items()}


def silent(found: Mapping[str, float]) -> list[str]:
    """Return the losses without any effect; all of them where together they have hardly one.

    >>> silent({"kd": 0.3, "fitnet": 0.0}), silent({"kd": 1e-5})
    (['fitnet'], ['kd'])
    """
    if sum(found.values()) < NO_EFFECT:
        return list(found)
    return [name for name, share in found.items() if share == 0.0]


def without_effect(shares: Mapping[str, float], active: Sequence[str]) -> str | None:
    """Return the warning that some losses with a weight do nothing, or nothing where all of them do."""
    found = silent({name: shares.get(name, 0.0) for name in active})
    if not found:
        return None
    some = "distillation" if found == list(active) else f"{', '.join(found)} of the distillation"
    return explain(
        f"{some} has no effect",
        f"shares of the gradient: {', '.join(f'{name} {share:.1g}' for name, share in shares.items())}",
        "raise the weights, tap layers that train, or pass a teacher that differs from the student",
    )


def check_names(own: Sequence[str] | None, teachers: Sequence[str] | None) -> None:
    """Raise when both name their classes, and not in the same order.

    >>> check_names(["cat", "dog"], ["cat", "dog"])
    """
    if own is None or teachers is None or list(own) == list(teachers):
        return
    same = sorted(own) == sorted(teachers)
    do = "use a teacher of the same classes"
    if same:
        do = f"pass Teacher(..., classes={[list(teachers).index(name) for name in own]})"
    raise AccelError(
        "the teacher's classes are not those of the student"
        + (", they come in another order" if same else ""),
        f"{list(own)[:5]} against {list(teachers)[:5]}",
        do,
    )


def check_order(chosen: Tensor, target: Tensor) -> None:
    """Raise when what the teacher chooses is a permutation of the labels, and not the labels.

    Args:
        chosen: Classes that the teacher chooses, (N,).
        target: Labels, (N,).

    Raises:
        AccelError: Most samples of nearly every label get one other class, a different one for each.

    >>> check_order(torch.arange(3).repeat(9), torch.arange(3).repeat(9))
    """
    refuse_moved(_permuted(chosen, target), some=False)


class Verdict(NamedTuple):
    """What is known of a teacher by what it chose for labels."""

    moved: dict[int, int]
    """Which other class is chosen for a label."""
    guesses: bool
    """Whether it is hardly better than guessing."""
    right: float
    """The share (0 to 1) of labels that it chose."""
    labels: int
    classes: int


class ClassOrder:
    """What a teacher chose for the labels of the first steps: are classes in another order, does it know any?

    A teacher that is right about most classes may have some of them swapped, and one that is right about hardly any
    may have all of them in another order. What it chooses anyway, step by step, is kept on the device and
    counted once or twice.

    >>> order = ClassOrder()
    >>> order.note(torch.tensor([0, 2, 1]).repeat(6), torch.tensor([0, 1, 2]).repeat(6))
    >>> order.swapped()
    {1: 2, 2: 1}
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._classes = 1

    def __len__(self) -> int:
        return len(self._kept)

    def note(
        self, chosen: Tensor, target: Tensor, labelled: Tensor | None = None, classes: int = 1
    ) -> None:
        """Keep what was chosen in a step, of so many classes, -1 where there is no label."""
        self._classes = classes
        if len(self._kept) < _STEPS:
            labels = target if labelled is None else target.where(labelled, -1)
            pair = (side.detach().flatten()[:_POSITIONS].clone() for side in (chosen, labels))
            self._kept.append((next(pair), next(pair)))

    def verdict(self, *, whole: bool) -> Verdict:
        """Judge by what was kept.

        Args:
            whole: Whether a teacher that was hardly better than guessing in the first step is judged as well.
        """
        chosen, labels = self._seen(len(self._kept))
        if not len(labels):
            return Verdict({}, False, 1.0, 0, self._classes)
        doubtful = whole and is_at_chance(*self._seen(1), self._classes)
        moved = (_permuted(chosen, labels) if doubtful else {}) or _swapped(chosen, labels)
        right = float((chosen == labels).float().mean())
        guesses = doubtful and is_at_chance(chosen, labels, self._classes)
        return Verdict(moved, guesses, right, len(labels), self._classes)

    def swapped(self) -> dict[int, int]:
        """Return which other class is nearly always chosen for a label, where these go round in a circle."""
        return _swapped(*self._seen(len(self._kept)))

    def _seen(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return what was chosen, and labels, where there are any in the first steps."""
        if not self._kept:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        both = zip(*self._kept[:steps], strict=True)
        chosen, labels = (torch.cat(side).cpu().long() for side in both)
        return chosen[labels >= 0], labels[labels >= 0]


def refuse_moved(moved: Mapping[int, int], *, some: bool) -> None:
    """Raise for classes that a teacher has in another order than the labels.

    Args:
        moved: For a label, the class that it chooses.
        some: Whether it has others where they belong.

    Raises:
        AccelError: There are any.
    """
    if moved:
        shown = ", ".join(f"{label} -> {other}" for label, other in list(moved.items())[:6])
        raise AccelError(
            f"{'some of ' if some else ''}the teacher's classes come in another order than the labels",
            f"label -> the class that the teacher chooses: {shown}",
            "pass Teacher(..., classes=[...]) with the teacher's index of each class, or a teacher that was "
            "trained on these labels",
        )


def _permuted(chosen: Tensor, target: Tensor) -> dict[int, int]:
    """Return which other classes are chosen where that is a permutation of nearly every label, not the labels."""
    mapping, faithful = _mapping(chosen, target)
    moved = {label: other for label, other in mapping.items() if label != other}
    one_to_one = len(set(mapping.values())) == len(mapping)
    nearly_every = 2 * len(mapping) >= len(target.unique())  # a few by chance are no order
    return moved if len(moved) >= 2 and one_to_one and faithful and nearly_every else {}


def _swapped(chosen: Tensor, target: Tensor) -> dict[int, int]:
    """Return which other class is nearly always chosen for a label, where these go round in a circle."""
    pairs, counts = torch.stack([target, chosen]).unique(dim=1, return_counts=True)
    seen: dict[int, int] = {}
    for label, count in zip(pairs[0].tolist(), counts.tolist(), strict=True):
        seen[label] = seen.get(label, 0) + count
    moved = {
        label: other
        for (label, other), count in zip(pairs.T.tolist(), counts.tolist(), strict=True)
        if label != other and seen[label] >= _LEAST and count >= _SURE * seen[label]
    }
    circles = {label: circle for label in moved if (circle := _circle(moved, label))}
    others = ~torch.isin(target, torch.tensor([*circles], dtype=target.dtype))
    right = (chosen == target)[others].float()
    knows = len(right) >= 2 * _SEEN and bool(right.mean() >= _KNOWS)
    least = _LEAST if knows else _SEEN
    return {
        label: moved[label]
        for label, circle in circles.items()
        if sum(seen[one] for one in circle) >= least * len(circle)
    }


def _circle(moved: Mapping[int, int], label: int) -> list[int]:
    """Return the labels that one meets from label to what was chosen for it until it comes again; none if it does not."""
    met = [label]
    while (at := moved.get(met[-1])) is not None and len(met) <= len(moved):
        if at == label:
            return met
        met.append(at)
    return []


def is_at_chance(chosen: Tensor, target: Tensor, num_classes: int) -> bool:
    """Tell whether the teacher is hardly better than guessing on this data.

    >>> is_at_chance(torch.zeros(40, dtype=torch.long), torch.arange(40) % 4, 4)
    True
    """
    right = float((chosen == target).float().mean())
    chance = 1.0 / num_classes
    return right < chance + 2.0 * (chance * (1 - chance) / max(len(target), 1)) ** 0.5


def _mapping(chosen: Tensor, target: Tensor) -> tuple[dict[int, int], bool]:
    """Return the class chosen most for each label seen often, and whether that is nearly always it."""
    mapping, hits, seen = {}, 0, 0
    for label in target.unique().tolist():
        answers = chosen[target == label]
        if len(answers) < _SEEN:
            continue
        most = int(answers.mode().values)
        mapping[label] = most
        hits += int((answers == most).sum())
        seen += len(answers)
    return mapping, seen > 0 and hits / seen > 0.6
