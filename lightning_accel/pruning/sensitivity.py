"""What each group of layers would give, and what it would cost, if it alone were cut.

Everything happens on copies. A group's own half is removed for real, not masked: then the same copy
tells the change of the output, the arithmetic and the time. Time that is saved and arithmetic that is
saved are not the same thing, and which layers repay a cut is the question that this table answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_accel.arguments import open_share, positive
from lightning_accel.errors import NoEffect
from lightning_accel.exact import exact
from lightning_accel.measure.flops import eval_mode
from lightning_accel.measure.table import Cell, Table
from lightning_accel.measure.timing import Comparison
from lightning_accel.pruning import importance as scoring
from lightning_accel.pruning import selection
from lightning_accel.pruning.graph import Graph, Group, RemovedUnits
from lightning_accel.pruning.importance import Importance
from lightning_accel.pruning.selection import Attention
from lightning_accel.pruning.target import Latency, Macs, Params
from lightning_accel.pruning.trains import in_dtype_of
from lightning_accel.surgery import Select, Structure, twin
from lightning_accel.surgery.call import Call, first, reals, run, same_random_state

_EVERYTHING, _AS_IT_IS = Select(), Structure()
_SAMPLES = 2  # enough to trace


class Row(NamedTuple):
    """One group of layers that can only be cut together, with a share of its own units removed.

    The saved shares are of the whole network; `time_saved` is measured, lies between `time_low` and
    `time_high` with 95 % confidence, and may be negative. `change` is that of the loss, or that of the output
    relative to its norm.
    """

    name: str
    kind: str
    units: int
    removed: int
    macs_saved: float
    params_saved: float
    time_saved: float
    time_low: float
    time_high: float
    change: float
    layers: tuple[str, ...]


def sensitivity(
    model: nn.Module,
    calls: Sequence[Call],
    *,
    share: float = 0.5,
    importance: Importance = "magnitude",
    select: Select = _EVERYTHING,
    attention: Attention = "heads",
    loss: Callable[[nn.Module], float] | None = None,
    budget_s: float = 10.0,
) -> list[Row]:
    """Cut each group of layers alone, on a copy, and return one row per group in the network's order.

    Args:
        model: The network; it stays as it is.
        calls: The calls of a calibration batch, of the size for which time matters.
        share: Share of the group's units that is removed, the least important ones.
        importance: One of `importance.KNOWN`, or a function of model and group.
        select: Layers to look at.
        attention: Whole "heads" go, or the same places of every head ("width").
        loss: Returns the loss of a copy of the model; by default the change of the output is taken.
        budget_s: Seconds for the measurement of time, of all groups together.

    Raises:
        NoEffect: Nothing can be pruned.
        ValueError: `share` or `budget_s` cannot be meant.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> (row,) = sensitivity(net, [Call("", (torch.ones(2, 4),), {})], budget_s=0.05)
    >>> row.name, row.units, row.removed, row.macs_saved
    ('0', 8, 4, 0.5)
    """
    open_share("share", share)
    positive("budget_s", budget_s, unit="seconds")
    scoring.check(importance)
    calls = in_dtype_of(calls, model)
    graph = graph_of(model, calls, select=select, attention=attention)
    bundles = _bundles(graph, importance, share)
    clock = Latency(0.5, budget_s=max(budget_s / len(bundles), 1e-3))
    cost = _loss(graph.model, loss) if loss else _outputs(graph.model, calls)
    rows = []
    for groups, gone in bundles:
        after = twin(graph.model)
        graph.cut(gone).apply(after)
        rows.append(
            Row(
                ", ".join(group.name for group in groups),
                groups[0].kind,
                sum(group.units for group in groups),
                sum(len(units) for units in gone.values()),
                1 - Macs(0.5).kept(graph, gone),
                1 - Params(0.5).kept(graph, gone),
                *_saved(clock.measured(graph.model, after, calls)),
                cost(after),
                tuple(layer for group in groups for layer in group.layers),
            )
        )
    return rows


def as_table(rows: Sequence[Row], *, share: float, device: str, measured: str) -> Table:
    """Return the rows as a table; `measured` says what `change` is of."""
    columns = ["layers", "kind", "units", "MACs", "parameters", "time", "95 % interval"]
    columns.append(f"change of the {measured}")
    cells: list[list[Cell]] = [
        [
            row.name,
            row.kind,
            f"{row.units} -> {row.units - row.removed}",
            _change(row.macs_saved),
            _change(row.params_saved),
            _change(row.time_saved),
            _interval(row),
            row.change,
        ]
        for row in rows
    ]
    notes = [
        f"each row: {share:.0%} of the units of these layers alone removed, on a copy",
        f"MACs, parameters and time of the whole network; time of a forward measured on {device}",
        *(
            f"slower when cut: {row.name}, {_interval(row)} time"
            for row in rows
            if row.time_high < 0
        ),
    ]
    if equal := [row.name for row in rows if row.time_low <= 0 <= row.time_high]:
        notes.append(f"no measurable difference in time: {', '.join(equal)}")
    return Table(columns, cells, "What each layer would give and cost", notes)


def _change(saved: float) -> str:
    return f"{-100 * saved:+.1f}%"


def _interval(row: Row) -> str:
    return f"{_change(row.time_high)} to {_change(row.time_low)}"


def _saved(found: Comparison) -> tuple[float, float, float]:
    ratio, low, high = (1 - 1 / gain for gain in (found.ratio, found.low, found.high))
    return ratio, low, high


def graph_of(
    model: nn.Module,
    calls: Sequence[Call],
    *,
    select: Select = _EVERYTHING,
    attention: Attention = "heads",
    dense: Structure = _AS_IT_IS,
) -> Graph:
    """Return the prunable groups of a copy of the model, found as `plan` finds them."""
    frozen = frozenset(n for n, p in model.named_parameters() if not p.requires_grad)
    return Graph(
        twin(model),
        in_dtype_of(first(calls, _SAMPLES), model),
        select=select,
        frozen=frozen,
        dense=dense,
        attention=attention,
    )


def _bundles(
    graph: Graph, importance: Importance, share: float
) -> list[tuple[list[Group], RemovedUnits]]:
    """Return the groups that can only be cut together, with what goes."""
    together: dict[Any, list[Group]] = {}
    for group in graph.groups:
        together.setdefault(group.name if group.link is None else group.link, []).append(group)
    found: list[tuple[list[Group], RemovedUnits]] = []
    reasons = []
    for groups in together.values():
        try:
            scores = {g.name: scoring.score(graph.model, g, importance) for g in groups}
            gone = selection.choose(groups, scores, ratio=share)
            graph.cut(gone)
        except ValueError as error:
            reasons.append(f"`{groups[0].name}`: {error}")
            continue
        if gone:
            found.append((groups, gone))
    if not found:
        raise NoEffect(
            f"no layer can lose {share:.0%} of its units",
            "; ".join(reasons[:4]) or "groups of one unit each",
            "raise `share`, or choose another importance",
        )
    return found


def _outputs(model: nn.Module, calls: Sequence[Call]) -> Callable[[nn.Module], float]:
    def values(network: nn.Module) -> torch.Tensor:
        with torch.inference_mode(), eval_mode(network), same_random_state(network):
            return torch.cat([exact(t).flatten() for t in reals(run(network, calls))])

    dense = values(model)
    return lambda network: float((values(network) - dense).norm() / dense.norm())


def _loss(model: nn.Module, loss: Callable[[nn.Module], float]) -> Callable[[nn.Module], float]:
    dense = loss(model)
    return lambda network: loss(network) - dense
