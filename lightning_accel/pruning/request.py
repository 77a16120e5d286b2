"""What to prune, as one checked object: the argument of everything that plans a cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_accel.arguments import flag, instance, one_of, open_share
from lightning_accel.errors import AccelError, Unsupported, explain
from lightning_accel.pruning import history as past
from lightning_accel.pruning import importance as scoring
from lightning_accel.pruning import schedule as scheduling
from lightning_accel.pruning import selection
from lightning_accel.pruning.activations import Statistics
from lightning_accel.pruning.foreign import (
    SAID_BY_PRUNER,
    Pruner,
    Turn,
    check_pruner,
    require_alone,
)
from lightning_accel.pruning.importance import Importance
from lightning_accel.pruning.rounding import check_round_to
from lightning_accel.pruning.schedule import Schedule
from lightning_accel.pruning.selection import Attention, Scope
from lightning_accel.pruning.target import Target
from lightning_accel.pruning.trains import Step
from lightning_accel.surgery import Select, Structure
from lightning_accel.surgery.call import Call

Depth = bool | Literal["only"]
ONLY: Literal["only"] = "only"
READ_THE_LOSS = ("taylor", "taylor2")
_EVERYTHING, _AS_IT_IS, _ONE_TURN = Select(), Structure(), Turn()


@dataclass(frozen=True)
class Request:
    """What to prune, checked when it is made; the arguments mean what they mean in `StructuredPruning`.

    Every public function of pruning makes one of its keyword arguments and hands it down. Where a part of it is due,
    or a part of it is had in another way, that is another request, made with `dataclasses.replace`.

    Raises:
        ValueError: An argument is out of range, or two do not go together.
        TypeError: An argument is of another type.

    >>> Request(ratio=0.5).scope
    'local'
    """

    ratio: float | None = None
    target: Target | None = None
    importance: Importance = "magnitude"
    scope: Scope = "local"
    select: Select = _EVERYTHING
    round_to: int | str | None = None
    attention: Attention = "heads"
    compensate: bool | None = None
    depth: Depth = False
    pruner: Pruner | None = None
    steps: int = 1
    schedule: Schedule = "linear"
    is_search: bool = False
    """Whether only a metric says how much may go."""

    def __post_init__(self) -> None:
        if self.is_search:
            past.require_no_schedule(self.schedule)
            self.asked([])  # each checked
            return
        _check_goal(self.ratio, self.target, self.pruner)
        if self.pruner is not None:
            require_alone({name: getattr(self, name) for name in SAID_BY_PRUNER})
        flag("compensate", self.compensate, none=True)
        check_round_to(self.round_to)
        selection.check_attention(self.attention)
        _check_depth(self)
        scoring.check(self.importance)
        selection.check_scope(self.scope)
        scheduling.check(self.schedule, self.steps)

    def settings(self) -> dict[str, Any]:
        """Return what is asked, by the names of the arguments of `StructuredPruning`."""
        # The state's key, `when`, and what follows from them are told elsewhere.
        left_out = ("select", "steps", "is_search")
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in left_out
        }

    def refuse_manual(self, automatic: bool) -> None:
        """Raise `Unsupported` where an importance needs the loss, and a module optimizes by hand."""
        if self.importance in READ_THE_LOSS and not automatic:
            raise Unsupported(
                f"importance={self.importance!r} needs the loss that `training_step` returns",
                "a module with manual optimization",
                "use importance='magnitude'",
            )

    def refuse_other_unit(self, before: str) -> None:
        """Raise when the steps that are done were counted in another unit than the target's.

        Args:
            before: The target of those steps, as it is written.

        Raises:
            AccelError: They were.
        """
        if self.target is None and not self.is_search:
            return
        name = type(self.target or self.asked([])[0].target).__name__
        if before.partition("(")[0] != name and not (self.is_search and before == "None"):
            raise AccelError(
                "a schedule that has begun goes on in the unit in which it began",
                f"target={before} in the checkpoint, {self.target} now",
                f"give the former kind of target, or `{name}` in a new fit from the weights of the checkpoint",
            )

    def asked(self, history: Sequence[past.Entry]) -> list[Request]:
        """Return what is asked; of a search what is asked next, and what where that cannot be had."""
        if not self.is_search:
            return [self]
        step = dataclasses.replace(self, steps=1, is_search=False, target=next(past.next_steps([])))
        return [dataclasses.replace(step, target=target) for target in past.next_steps(history)]


@dataclass(frozen=True)
class Occasion:
    """What a plan is made from beside the network and what is asked of it.

    Attributes:
        dense: Shapes before earlier cuts, of which `ratio` is a share.
        batches: The calls of each calibration batch, for what measures; without any, the example is taken.
        statistics: What was measured already.
        steps: What else has to run with the smaller network, where it does now.
        turn: Which of its steps a pruner of torch-pruning is to make.
        thorough: Whether blocks and width are weighed by more than one trial.
        seconds: After these no more groups are tried one by one.
    """

    dense: Structure = _AS_IT_IS
    batches: Sequence[Sequence[Call]] = ()
    statistics: Statistics | None = None
    steps: Sequence[Step] = ()
    turn: Turn = _ONE_TURN
    thorough: bool = True
    seconds: float = 300.0


def _check_goal(ratio: Any, target: Any, pruner: Any) -> None:
    """Raise unless exactly one of these is given, and is what it should be."""
    given = {"ratio": ratio, "target": target, "pruner": pruner}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(
            explain(
                "pruning takes either `ratio` or `target`, or a `pruner` of torch-pruning",
                ", ".join(f"{n}={v!r}" for n, v in given.items() if n != "pruner" or v is not None),
                "pass one of them",
            )
        )
    if pruner is not None:
        check_pruner(pruner)
    open_share("ratio", ratio, none=True)
    instance("target", target, Target, "what to keep", "pass Macs(0.5), say", none=True)


def _check_depth(request: Request) -> None:
    """Raise unless `depth` is true, false or "only", and goes with the rest."""
    depth = request.depth
    if isinstance(depth, str):
        one_of("depth", depth, (ONLY,))
    else:  # blocks and width, or width alone
        flag("depth", depth)
    if depth and request.pruner is not None:
        raise ValueError(
            explain(
                "a pruner of torch-pruning knows no whole blocks",
                f"depth={depth!r} beside `pruner`",
                "leave one of them out",
            )
        )
    if depth is True and request.ratio is not None:
        raise ValueError(
            explain(
                "`ratio` is a share of channels, or with depth='only' of blocks, and not of both at once",
                f"ratio={request.ratio!r}, depth=True",
                "pass target=Macs(0.5), say, or depth='only'",
            )
        )
    if depth is True and request.importance == "taylor2":
        raise ValueError(
            explain(
                "importance='taylor2' is measured on the whole network, and does not hold without blocks",
                "depth=True",
                "choose another importance, 'taylor' say, or depth='only'",
            )
        )
