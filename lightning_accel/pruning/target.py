"""Which share of channels leads to a share of the arithmetic.

Channels are the wrong interface for a budget: half of them leave anything from a fifth to two thirds
of the MACs. So the ratio is found by bisection on copies; one trace serves all tries.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lightning_accel.errors import NoEffect
from lightning_accel.measure.flops import count_macs
from lightning_accel.pruning.graph import Graph, Group
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call

_STEPS = 12


def ratio_for_macs(
    graph: Graph,
    groups: Sequence[Group],
    calls: Sequence[Call],
    *,
    share: float,
    round_to: int | None,
) -> float:
    """Return the smallest ratio that leaves at most `share` of the MACs, to 1/4096.

    Raises:
        NoEffect: Even almost all channels of these groups leave more than that.
    """
    dense = macs_of(graph.model, calls)

    def left(ratio: float) -> float:
        model = twin(graph.model)
        graph.cut(ratio, round_to=round_to, groups=groups).apply(model)
        return macs_of(model, calls) / dense

    low, high = 0.0, 1.0 - 2.0**-_STEPS
    if left(high) > share:
        raise NoEffect(
            f"the network cannot be pruned to {share:.0%} of its MACs",
            f"{left(high):.0%} remain when one channel per prunable layer is left",
            "raise `target_macs`, or widen `select`",
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if left(middle) <= share else (middle, high)
    return high


def macs_of(model: nn.Module, calls: Sequence[Call]) -> int:
    """Return the multiply-accumulates of the calls."""
    return sum(count_macs(model.get_submodule(c.name), c.args, c.kwargs).macs for c in calls)
