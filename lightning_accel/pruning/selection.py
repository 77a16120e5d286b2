"""Which units go, given their scores.

What can only shrink together (groups of one link: an embedding and the heads that fill it) is one
*column* here, and a column shrinks by *steps*: the fewest units that keep heads whole, links equal and
widths a multiple of `round_to`. All ranking is of steps, so nothing has to be skipped or repaired
afterwards, and a larger ratio always removes a superset of what a smaller one removes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_accel.arguments import one_of
from lightning_accel.pruning.groups import Group
from lightning_accel.surgery import Change

Scope = Literal["local", "global", "isomorphic", "sensitivity"]
SCOPES = get_args(Scope)
Attention = Literal["heads", "width"]
ATTENTION = get_args(Attention)

_SHALLOW = 0.9
"""One ranking over groups takes no more than this share of a group before all have lost as much."""


def choose(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    *,
    ratio: float,
    scope: str = "local",
    round_to: int | None = None,
) -> dict[str, list[int]]:
    """Return the units to remove, ascending, for each group that loses any.

    Args:
        groups: All groups that may shrink.
        scores: One per unit, shape (units,), by name of the group; the least go first.
        ratio: Share of the dense units to remove, 0 to 1. At least one unit of each group stays.
        scope: "local" takes the same share of every group; "global" ranks all units together, taking
            more than 90 % of a group only after the others; "isomorphic" does so among groups of equal
            structure (Fang et al. 2024, arXiv:2407.04616). "sensitivity" is "global", for the scores of `weighing`.
        round_to: Kept channels are raised to a multiple of this; heads are not rounded. Groups that
            are too narrow for it stay whole, and `immovable` names them.

    Raises:
        ValueError: The scope is unknown, or groups of one link differ in width.

    >>> from lightning_accel.pruning.groups import Group
    >>> pair = [Group(name, "channels", 4, (), (name,), 4) for name in "ab"]
    >>> scores = {"a": torch.tensor([3.0, 1.0, 2.0, 4.0]), "b": torch.tensor([9.0, 8.0, 7.0, 6.0])}
    >>> choose(pair, scores, ratio=0.5), choose(pair, scores, ratio=0.3, scope="global")
    ({'a': [1, 2], 'b': [2, 3]}, {'a': [1, 2]})
    """
    check_scope(scope)
    columns = _columns(groups, round_to)
    if scope == "local":
        sets = [[column] for column in columns]
    elif scope in ("global", "sensitivity"):
        sets = [columns]
    else:
        sets = _isomorphic(columns)
    gone: dict[str, list[int]] = {}
    for ranked in sets:
        steps = _local(ranked[0], ratio) if scope == "local" else _together(ranked, scores, ratio)
        for column, taken in zip(ranked, steps, strict=True):
            for group in column.groups:
                count = column.removed(taken, group)
                if count:
                    gone[group.name] = least(scores[group.name], kept=group.units - count)
    return gone


def check_scope(scope: Any) -> None:
    """Raise unless the scope is known.

    Raises:
        TypeError: It is no text.
        ValueError: It is another one.
    """
    one_of("scope", scope, SCOPES)


def check_attention(attention: Any) -> None:
    """Raise unless this is what can go of attention: whole heads, or the same places of every head ("width").

    Raises:
        TypeError: It is no text.
        ValueError: It is another one.
    """
    one_of("attention", attention, ATTENTION)


def immovable(groups: Sequence[Group], *, round_to: int | None = None) -> list[Change]:
    """Name the groups that no ratio can shrink, with the reason.

    >>> from lightning_accel.pruning.groups import Group
    >>> immovable([Group("fc", "channels", 4, (), ("fc",), 4)], round_to=8)[0].what
    'its 4 channels cannot shrink to a multiple of 8'
    """
    found = []
    for column in _columns(groups, round_to):
        if len(column.kept) > 1:
            continue
        for group in column.groups:
            what = f"its {group.units} {group.kind} cannot shrink to a multiple of {column.step}"
            found.append(Change(group.name, "it has one unit only" if group.units == 1 else what))
    return found


def kept_width(width: int, *, ratio: float, round_to: int | None = None) -> int:
    """Return how many of `width` units stay when a share `ratio` of them is to go.

    Args:
        width: Units of the dense layer.
        ratio: Share to remove, 0 to 1. At least one unit stays.
        round_to: The result is raised to a multiple of this, up to `width`.

    >>> kept_width(10, ratio=0.3), kept_width(10, ratio=0.3, round_to=8), kept_width(4, ratio=0.99)
    (7, 8, 1)
    """
    kept = max(1, width - math.floor(width * ratio + 1e-6))
    return min(width, math.ceil(kept / round_to) * round_to) if round_to else kept


def least(scores: Tensor, *, kept: int) -> list[int]:
    """Return the numbers of the least important units, ascending, so that `kept` stay.

    >>> least(torch.tensor([3.0, 1.0, 2.0, 4.0]), kept=2)
    [1, 2]
    """
    order = torch.argsort(scores, stable=True)[: max(len(scores) - kept, 0)]
    return sorted(order.tolist())


class _Column(NamedTuple):
    """Groups that shrink together; widths are positions on the axis that they share."""

    groups: list[Group]
    step: int
    dense: int
    kept: list[int]  # the widths it can have, descending from the present one

    def removed(self, taken: int, group: Group) -> int:
        """Return how many units `group` loses after `taken` steps."""
        return group.units - self.kept[taken] // group.per_unit


def _columns(groups: Sequence[Group], round_to: int | None) -> list[_Column]:
    linked: dict[Any, list[Group]] = {}
    for group in groups:
        key = ("link", group.link) if group.link is not None else ("alone", group.name)
        linked.setdefault(key, []).append(group)
    return [_column(members, round_to) for members in linked.values()]


def _column(groups: list[Group], round_to: int | None) -> _Column:
    widths = {group.units * group.per_unit for group in groups}
    if len(widths) > 1:
        names = ", ".join(f"`{g.name}` {g.units * g.per_unit}" for g in groups)
        raise ValueError(f"groups that must keep the same width differ in it: {names}")
    (width,) = widths
    step = math.lcm(*(_step(group, round_to) * group.per_unit for group in groups))
    dense = max(group.dense * group.per_unit for group in groups)
    largest = (width - 1) // step * step
    return _Column(groups, step, dense, [width, *range(largest, 0, -step)])


def _step(group: Group, round_to: int | None) -> int:
    """Return the fewest units whose channels are a multiple of `round_to`, and of what kernels need."""
    return math.lcm(_rounded(group, round_to), group.multiple)


def _rounded(group: Group, round_to: int | None) -> int:
    if round_to is None or group.kind == "heads":
        return 1
    if group.kind == "width":
        return round_to
    # A unit of several rows: one per block of a grouped convolution, say.
    rows = [m.positions.shape[1] for m in group.members if m.role == "out"]
    return round_to // math.gcd(round_to, min(rows, default=1))


def _local(column: _Column, ratio: float) -> list[int]:
    wanted = kept_width(column.dense, ratio=ratio)
    return [sum(width >= wanted for width in column.kept[1:])]


class _Step(NamedTuple):
    """One step of one column, in the order in which steps are taken."""

    deep: bool
    score: float
    share: float
    column: int
    cost: int


def _together(columns: Sequence[_Column], scores: Mapping[str, Tensor], ratio: float) -> list[int]:
    """Return how many steps each column takes when all are ranked together."""
    steps = sorted(step for i, column in enumerate(columns) for step in _steps(i, column, scores))
    groups = [group for column in columns for group in column.groups]
    dense = sum(group.dense for group in groups)
    left = math.floor(dense * ratio + 1e-6) - (dense - sum(group.units for group in groups))
    taken = [0] * len(columns)
    for step in steps:
        left -= step.cost
        if left < 0:
            break  # not a later, cheaper one: a larger ratio must remove all that a smaller one does
        taken[step.column] += 1
    return taken


def _steps(index: int, column: _Column, scores: Mapping[str, Tensor]) -> list[_Step]:
    ranked = [scores[group.name].double().sort(stable=True).values for group in column.groups]
    found = []
    for taken in range(1, len(column.kept)):
        bounds = [
            (column.removed(taken - 1, group), column.removed(taken, group))
            for group in column.groups
        ]
        values = [float(r[a:b].mean()) for r, (a, b) in zip(ranked, bounds, strict=True)]
        share = 1 - column.kept[taken] / column.dense
        found.append(
            _Step(
                share > _SHALLOW + 1e-9,
                sum(values) / len(values),
                share,
                index,
                sum(b - a for a, b in bounds),
            )
        )
    return found


def _isomorphic(columns: Sequence[_Column]) -> list[list[_Column]]:
    sets: dict[Any, list[_Column]] = {}
    for column in columns:
        sets.setdefault(repr(sorted(map(_structure, column.groups))), []).append(column)
    return list(sets.values())


def _structure(group: Group) -> Any:
    """Describe which tensors hang together, not how wide they are or where they stand."""
    return group.kind, sorted((m.tensor.rpartition(".")[2], m.dim, m.role) for m in group.members)
