"""What a channel of each layer costs for what it saves, measured: the change of the outputs per arithmetic.

Importances compare the channels of one layer well, and those of two layers badly: they know nothing of what follows.
So the least important quarter, half and three quarters of each group of layers are removed alone, on a copy, and
the change of the network's outputs is measured (sensitivity analysis, Li et al. 2017, arXiv:1608.08710). Between
these the squared change is taken to rise evenly. What all layers lose together is then the least that their sum costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_accel.pruning.graph import Graph, Group
from lightning_accel.pruning.leftover import Leftover
from lightning_accel.pruning.selection import least
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call, batch_size

_SHARES = (0.25, 0.5, 0.75)
_SAMPLES = 64
_BEYOND = 4.0  # times the price of what was measured last
_NEARLY_NOTHING = 1e-9


def weighed(
    graph: Graph, scores: Mapping[str, Tensor], batches: Sequence[Sequence[Call]]
) -> dict[str, Tensor]:
    """Return what each unit costs per arithmetic saved, in the order of its scores: comparable across groups.

    Args:
        graph: The groups; its model is not changed.
        scores: One per unit, by name of the group.
        batches: Calibration batches.
    """
    leftover = Leftover(graph.model, _few(batches), renews=True)
    bundles: dict[Any, list[Group]] = {}
    for group in graph.groups:
        if group.name in scores:
            key = group.name if group.link is None else group.link
            bundles.setdefault(key, []).append(group)
    whole = max(graph.macs({}), 1)
    found: dict[str, Tensor] = {}
    for groups in bundles.values():
        knots = [(0, 0.0, 0.0)]
        units = groups[0].units
        for share in _SHARES:
            count = int(units * share)
            if count > knots[-1][0]:
                gone = {
                    g.name: least(scores[g.name], kept=g.units - _of(g, groups, count))
                    for g in groups
                }
                after = twin(graph.model)
                graph.cut(gone).apply(after)
                for name, module in after.named_modules():  # norms that train get new statistics
                    module.training = name in graph.trains
                saved = 1 - graph.macs(gone) / whole
                knots.append((count, leftover.of(after) ** 2, saved))
        prices = _prices(knots, units)
        for group in groups:
            order = torch.argsort(scores[group.name], stable=True)
            places = torch.arange(group.units) * units // group.units
            found[group.name] = torch.empty(group.units, dtype=torch.float64)
            found[group.name][order.cpu()] = prices[places]
    return found


def _few(batches: Sequence[Sequence[Call]]) -> list[Sequence[Call]]:
    """Return the first batches that hold enough samples together; many networks run on them."""
    few, samples = [], 0
    for calls in batches:
        few.append(calls)
        samples += batch_size(calls) or 1
        if samples >= _SAMPLES:
            break
    return few


def _of(group: Group, groups: Sequence[Group], count: int) -> int:
    """Return as many units of a group as `count` units of the first one of its bundle are."""
    return count * group.units // groups[0].units


def _prices(knots: Sequence[tuple[int, float, float]], units: int) -> Tensor:
    """Return the price of each unit, ascending, from (units that are gone, squared error, share saved).

    >>> _prices([(0, 0.0, 0.0), (2, 1.0, 0.5), (3, 4.0, 0.75)], 4).round()
    tensor([ 2.,  2., 12., 48.], dtype=torch.float64)
    """
    prices = torch.zeros(units, dtype=torch.float64)
    price = 0.0
    for (before, error, saved), (after, more, all_saved) in pairwise(knots):
        slope = (more - error) / max(all_saved - saved, _NEARLY_NOTHING)
        price = max(price, slope, _NEARLY_NOTHING)
        prices[before:after] = price
    prices[knots[-1][0] :] = price * _BEYOND if price else 1.0
    return prices * (1 + 1e-9 * torch.arange(units, dtype=torch.float64))
