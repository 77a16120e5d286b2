"""One summand of what a student learns from: which loss, on which tensors, how strongly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

from torch import Tensor

from lightning_accel.arguments import one_of, whole
from lightning_accel.distillation import losses
from lightning_accel.distillation.criterion import CLASSES, LABELS, NUMBERS
from lightning_accel.distillation.distributed import all_rows, num_processes, share_of_all
from lightning_accel.distillation.projector import LAYOUTS
from lightning_accel.distillation.schedule import FitProgress, Number, is_constant, now, read
from lightning_accel.errors import explain

Loss = Callable[..., Tensor]


class LossKind(NamedTuple):
    """What a known loss reads, and the weight that its paper gives it beside cross entropy."""

    loss: Loss
    reads: str  # "logits", or of features: "matched", "maps", "rows", "embedded"
    weight: float
    across_rows: bool = False  # a statistic of the whole batch
    compares: str | None = CLASSES  # what logits are to it; `None` is a function of the user's


KNOWN = {
    "kd": LossKind(losses.kd, "logits", 0.9),
    "logit_standardized_kd": LossKind(losses.logit_standardized_kd, "logits", 9.0),
    "dkd": LossKind(losses.dkd, "logits", 1.0),
    "dist": LossKind(losses.dist, "logits", 1.0, across_rows=True),
    "jsd": LossKind(losses.jsd, "logits", 1.0),
    "bce": LossKind(losses.bce, "logits", 1.0, compares=LABELS),
    "mse": LossKind(losses.mse, "logits", 1.0, compares=NUMBERS),
    "fitnet": LossKind(losses.fitnet, "matched", 100.0),
    "attention_transfer": LossKind(losses.attention_transfer, "maps", 1000.0),
    "rkd": LossKind(losses.rkd, "rows", 1.0, across_rows=True),
    "similarity_preserving": LossKind(
        losses.similarity_preserving, "rows", 3000.0, across_rows=True
    ),
    "crd": LossKind(losses.crd, "embedded", 0.8, across_rows=True),
}
"""The losses that are known by name."""

_ALSO = {"bce_kd": "bce"}


class LossTerm:
    """One summand of the loss.

    Args:
        loss: A name of `KNOWN`, or a function of student, teacher and keywords.
        weight: Its factor; by default the paper's. A number, a `Schedule`, or a function of the `FitProgress`.
        temperature: Of the softmax, where the loss has one; as `weight`.
        layers: Pairs of layers for a loss on features: `{"layer2": "layer4"}`, `"layer2: layer4"`, a list
            of names, or a `Select`. A function of your own reads logits without it, in the form that the
            networks give them; all other losses get them with the classes last.
        student_layout: Of the student's features, where their dimensions do not tell: "BHWC", "BCL".
        teacher_layout: As `student_layout`.
        teacher: Whose features, among several teachers.
        keywords: Further keywords of the loss.

    Raises:
        ValueError: The name is unknown, layers are missing or superfluous, or a keyword is unknown.

    >>> LossTerm("kd", weight=0.5, temperature=2.0).values(FitProgress())
    (0.5, {'temperature': 2.0})
    """

    def __init__(
        self,
        loss: str | Loss = "kd",
        *,
        weight: Any = None,
        temperature: Any = None,
        layers: Any = None,
        student_layout: str | None = None,
        teacher_layout: str | None = None,
        teacher: int | None = None,
        **keywords: Any,
    ) -> None:
        kind = _kind(loss, layers is not None)
        self.loss, self.reads, self.across_rows = kind.loss, kind.reads, kind.across_rows
        self.compares = kind.compares if kind.reads == "logits" else None
        self.name = loss if isinstance(loss, str) else getattr(loss, "__name__", "loss")
        self.weight = read(kind.weight if weight is None else weight, "weight")
        self.temperature: Number | None = None
        if temperature is not None:
            self.temperature = read(temperature, "temperature")
            if self.temperature == 0:
                raise ValueError(
                    explain("`temperature` must be above 0", repr(temperature), "pass 4.0, say")
                )
        one_of("student_layout", student_layout, LAYOUTS, none=True)
        one_of("teacher_layout", teacher_layout, LAYOUTS, none=True)
        self.layers = layers
        self.layouts = (student_layout, teacher_layout)
        self.teacher = whole("teacher", teacher, least=0, none=True)
        self.keywords = keywords
        self._check()

    def in_form(self, name: str) -> LossTerm:
        """Return this summand with a known loss in the place of its own: same weight, and temperature where it has one."""
        made = LossTerm(name, weight=self.weight, teacher=self.teacher)
        if "temperature" in made.takes:
            made.temperature = self.temperature
        return made

    @cached_property
    def takes(self) -> frozenset[str]:
        """Return the names of the keywords that the loss takes."""
        return frozenset(inspect.signature(self.loss).parameters)

    @cached_property
    def needs_target(self) -> bool:
        """Whether the loss cannot do without labels."""
        found = inspect.signature(self.loss).parameters.get("target")
        return found is not None and found.default is inspect.Parameter.empty

    def values(self, moment: FitProgress) -> tuple[float, dict[str, Any]]:
        """Return weight and keywords at a moment of the fit."""
        keywords = dict(self.keywords)
        if self.temperature is not None:
            keywords["temperature"] = now(self.temperature, moment)
        return now(self.weight, moment), keywords

    def fixed_temperature(self) -> float | None:
        """Return the temperature when it never changes, and `None` when it does or there is none."""
        if "temperature" not in self.takes:
            return 1.0
        if self.temperature is None:
            default = inspect.signature(self.loss).parameters["temperature"].default
            return float(default)
        return now(self.temperature, FitProgress()) if is_constant(self.temperature) else None

    def over_all(self, student: Tensor, teacher: Tensor, given: dict[str, Any]) -> Tensor:
        """Compute the loss over the rows of all processes.

        Args:
            student: What it reads of the student.
            teacher: Likewise.
            given: The keywords.
        """
        if self.across_rows and student.shape[:-1].numel() * num_processes() < 2:
            return 0.0 * student.sum()  # a last batch of one row has no relations
        if num_processes() == 1:
            return self.loss(student, teacher, **given)
        if self.across_rows:
            if self.reads == "logits":  # each position is a row; sequences may differ in length
                student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
                given = {k: v.flatten() if isinstance(v, Tensor) else v for k, v in given.items()}
            student, teacher = all_rows(student), all_rows(teacher)
            given = {k: all_rows(v) if isinstance(v, Tensor) else v for k, v in given.items()}
            value = self.loss(student, teacher, **given)
            # Each process has the gradient of its own rows only, and gradients are averaged.
            return value + (num_processes() - 1) * (value - value.detach())
        value = self.loss(student, teacher, **given)
        mask = given.get("mask")
        return value if mask is None else value * share_of_all(mask)

    def _check(self) -> None:
        if self.reads == "logits" and self.layers is not None:
            raise ValueError(
                explain(
                    f"`{self.name}` reads logits, not layers", f"layers={self.layers}", "drop them"
                )
            )
        if self.reads != "logits" and self.layers is None:
            raise ValueError(
                explain(
                    f"`{self.name}` reads features and needs `layers`",
                    "none",
                    "pass pairs of layers: layers={'student.layer': 'teacher.layer'}",
                )
            )
        given = {*self.keywords, *(("temperature",) if self.temperature is not None else ())}
        several = any(
            p.kind is inspect.Parameter.VAR_KEYWORD
            for p in inspect.signature(self.loss).parameters.values()
        )
        unknown = set() if several else given - self.takes
        if unknown:
            raise ValueError(
                explain(
                    f"`{self.name}` has no such keyword",
                    ", ".join(sorted(unknown)),
                    f"it takes {', '.join(sorted(self.takes))}",
                )
            )


def loss_terms(losses: Any) -> dict[str, LossTerm]:
    """Read what a user writes as losses, by name and in order.

    Args:
        losses: A name, a function or a `LossTerm`; a list of those; or a mapping of names to weights, to
            keywords of `LossTerm`, to functions or to `LossTerm`s. A name that is not a loss needs `loss`
            among the keywords; `None` leaves one out.

    Raises:
        ValueError: There is none, or one is not understood.

    >>> list(loss_terms({"kd": 0.9, "hint": {"loss": "fitnet", "layers": "body"}}))
    ['kd', 'hint']
    """
    if isinstance(losses, Mapping):
        given = {str(k): _term(str(k), v) for k, v in losses.items() if v is not None}
    else:
        listed: Sequence[Any] = losses if isinstance(losses, (list, tuple)) else [losses]
        each = [item if isinstance(item, LossTerm) else LossTerm(item) for item in listed]
        given = {term.name: term for term in each}
        if len(given) != len(each):
            raise ValueError(
                explain(
                    "two losses have one name",
                    ", ".join(t.name for t in each),
                    "pass a mapping with a name for each",
                )
            )
    if not given:
        raise ValueError(explain("there is no loss to distil with", repr(losses), "pass 'kd'"))
    if "task" in given:
        raise ValueError(
            explain("`task` is the name of the user's own loss", "a term", "rename it")
        )
    return given


def _term(name: str, value: Any) -> LossTerm:
    if isinstance(value, LossTerm):
        return value
    if isinstance(value, Mapping):
        return LossTerm(**{"loss": name, **value})
    return LossTerm(value) if callable(value) else LossTerm(name, weight=value)


def _kind(loss: Any, on_layers: bool) -> LossKind:
    if isinstance(loss, str):
        loss = _ALSO.get(loss, loss)
        if loss not in KNOWN:
            raise ValueError(
                explain(
                    "unknown loss", repr(loss), f"pass one of {', '.join(KNOWN)}, or a function"
                )
            )
        return KNOWN[loss]
    if not callable(loss):
        raise TypeError(
            explain("a loss is a name or a function", repr(loss), f"pass one of {', '.join(KNOWN)}")
        )
    plain = loss.func if isinstance(loss, partial) else loss
    known = next((kind for kind in KNOWN.values() if kind.loss is plain), None)
    if known is not None:
        return known._replace(loss=loss)
    return LossKind(loss, "matched" if on_layers else "logits", 1.0, compares=None)
