"""Which multiple of channels pays on this machine.

Kernels work on blocks of channels: on AVX-512 a convolution of 64 channels takes 36 % less time than one
of 65, and one of 81 as long as one of 90. A linear layer has no such steps. So the right multiple is a
property of the machine and of the network, and is measured: multiples 1, 4, 8, 16 and 32 at equal
arithmetic, and the one that takes the least time per arithmetic kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lightning_accel.arguments import one_of, whole
from lightning_accel.errors import NoEffect
from lightning_accel.pruning.graph import RemovedUnits
from lightning_accel.pruning.search import same
from lightning_accel.pruning.target import Latency, Macs, Prunable, Target

MEASURED = "measured"
MULTIPLES = (1, 4, 8, 16, 32)

_WORTH = (
    0.97  # what a coarser multiple must need of a finer one's time, so that noise decides nothing
)


def best_round_to(
    graph: Prunable,
    gone_at: Callable[[int], RemovedUnits],
    *,
    batch_size: int | None = None,
    multiples: Sequence[int] = MULTIPLES,
    budget_s: float = 1.0,
) -> int:
    """Return the multiple of channels that takes the least time per arithmetic kept, measured here.

    A coarser multiple has to be 3 % faster than all finer ones, or the finer one is taken.

    Args:
        graph: The network.
        gone_at: What goes when kept channels are raised to this multiple. May raise `NoEffect`.
        batch_size: Samples of the forward; `None` takes as many as the graph's example has.
        multiples: Candidates, ascending.
        budget_s: Seconds per candidate.

    Raises:
        NoEffect: None of the multiples leaves anything to remove.
    """
    clock = Latency(0.5, batch_size=batch_size, budget_s=budget_s)
    best, best_time, tried = 0, math.inf, list[RemovedUnits]()
    for multiple in multiples:
        try:
            gone = gone_at(multiple)
        except NoEffect:
            continue  # too coarse for these widths
        if not gone or any(same(gone, other) for other in tried):
            continue
        tried.append(gone)
        time = clock.kept(graph, gone) / Macs(0.5).kept(graph, gone)
        if time < best_time * _WORTH:
            best, best_time = multiple, time
    if not best:
        raise NoEffect(
            "no rounding leaves a channel to remove",
            f"multiples {', '.join(map(str, multiples))}",
            "raise `ratio`, lower the target's share, or pass round_to=1",
        )
    return best


def reach(
    graph: Prunable,
    pick: Callable[[float, int | None], RemovedUnits],
    *,
    ratio: float | None = None,
    target: Target | None = None,
    round_to: int | str | None = None,
    batch_size: int | None = None,
) -> tuple[RemovedUnits, int | None]:
    """Return what has to go for a share of the channels or a target, and the multiple that was used.

    Args:
        graph: The network.
        pick: What goes for a share of the channels and a multiple.
        ratio: Share of the channels to remove.
        target: Instead of `ratio`, what to reach.
        round_to: A multiple, or "measured"; `None` is none, except that a `Latency` is measured.
        batch_size: Samples of a forward, where rounding is measured and the target names none.

    Raises:
        NoEffect: The target cannot be reached, or there is nothing to remove.
    """

    def gone_at(multiple: int | None, goal: Target | None) -> RemovedUnits:
        if goal is None:
            assert ratio is not None
            return pick(ratio, multiple)
        return goal.reach(graph, lambda share: pick(share, multiple))

    if round_to == MEASURED or (round_to is None and isinstance(target, Latency)):
        # Multiples are compared at equal arithmetic, which is counted, so that only they are measured.
        like = None if target is None else Macs(target.share)
        round_to = best_round_to(
            graph,
            lambda multiple: gone_at(multiple, like),
            batch_size=getattr(target, "batch_size", None) or batch_size,
            budget_s=getattr(target, "budget_s", 1.0),
        )
    assert not isinstance(round_to, str)
    return gone_at(round_to, target), round_to


def check_round_to(round_to: Any) -> None:
    """Raise unless `round_to` is a positive whole number of channels, "measured" or `None`.

    Raises:
        TypeError: It is of another kind.
        ValueError: It is another text, or below 1.
    """
    if isinstance(round_to, str):
        one_of("round_to", round_to, (MEASURED,))
    else:
        whole("round_to", round_to, none=True, do="pass 8, or 'measured'")
