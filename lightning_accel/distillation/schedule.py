"""Weights and temperatures that change over a fit.

A number that changes is a `Schedule`: it stays at `start` for `delay`, moves to `end` during `over`, and
stays there. DKD's warm-up of twenty epochs is `Schedule(0, 1, over=20, unit="epoch")`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from lightning_accel.arguments import finite, one_of
from lightning_accel.errors import explain

Unit = Literal["fit", "epoch", "step"]
UNITS = get_args(Unit)
Shape = Literal["linear", "cosine"]
SHAPES = get_args(Shape)


class FitProgress(NamedTuple):
    """Where a fit is: optimizer steps, epochs with their fraction, and the share (0 to 1) of the whole."""

    step: int = 0
    epoch: float = 0.0
    share: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """A number that moves from one value to another.

    Args:
        start: The value at first.
        end: The value at last.
        over: How long the move takes, above 0.
        unit: What `over` and `delay` count: "fit" is shares of the whole fit, or "epoch" or "step".
        delay: How long the first value stays.
        shape: "linear" or "cosine".

    Raises:
        TypeError: An argument is of another kind.
        ValueError: An argument is out of range.

    >>> Schedule(0.0, 1.0, over=20, unit="epoch").at(FitProgress(epoch=5))
    0.25
    """

    start: float
    end: float
    over: float = 1.0
    unit: Unit = "fit"
    delay: float = 0.0
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        one_of("unit", self.unit, UNITS)
        one_of("shape", self.shape, SHAPES)
        finite("start", self.start)
        finite("end", self.end)
        do = "pass how long the value moves, such as over=0.5 of a fit"
        finite("over", self.over, above=0.0, do=do)
        finite("delay", self.delay, least=0.0)

    def at(self, moment: FitProgress) -> float:
        """Return the value at a moment of the fit."""
        now = {"fit": moment.share, "epoch": moment.epoch, "step": float(moment.step)}[self.unit]
        done = min(max((now - self.delay) / self.over, 0.0), 1.0)
        if self.shape == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return self.start + (self.end - self.start) * done


Number = float | Schedule | Callable[[FitProgress], float]
"""A number, or how it changes."""


def read(value: Any, name: str) -> Number:
    """Read a number, a `Schedule`, its arguments as a mapping, or a function of the `FitProgress`.

    >>> read({"start": 0, "end": 1}, "weight")
    Schedule(start=0, end=1, over=1.0, unit='fit', delay=0.0, shape='linear')
    """
    if isinstance(value, Mapping):
        try:
            return Schedule(**value)
        except TypeError as error:
            raise TypeError(
                explain(
                    f"`{name}` as a mapping is a Schedule", str(error), "pass start, end and over"
                )
            ) from None
    if isinstance(value, Schedule) or (callable(value) and not isinstance(value, type)):
        return value
    return finite(name, value, least=0.0)


def now(value: Number, moment: FitProgress) -> float:
    """Return the value of a number at a moment."""
    if isinstance(value, Schedule):
        return value.at(moment)
    return float(value(moment)) if callable(value) else float(value)


def is_constant(value: Number) -> bool:
    """Tell whether a number stays what it is."""
    return not isinstance(value, Schedule) and not callable(value)


def require_some(*weights: Number) -> None:
    """Raise unless some weight of a loss is above zero at some time."""
    if all(is_constant(weight) and weight == 0 for weight in weights):
        raise ValueError(
            explain(
                "every weight is 0, so the student would learn nothing",
                "task_weight=0 and a weight of 0 for each loss",
                "pass a weight above 0, such as 0.9",
            )
        )
