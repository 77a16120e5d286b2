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

from lightning_accel.errors import NoEffect, explain
from lightning_accel.pruning.graph import Gone
from lightning_accel.pruning.target import Latency, Macs, Prunable, Target, same

MEASURED = "measured"
MULTIPLES = (1, 4, 8, 16, 32)

_WORTH = (
    0.97  # what a coarser multiple must need of a finer one's time, so that noise decides nothing
)


def best_round_to(
    graph: Prunable,
    gone_at: Callable[[int], Gone],
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
    best, best_time, tried = 0, math.inf, list[Gone]()
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
    target: Target,
    graph: Prunable,
    pick: Callable[[float, int | None], Gone],
    *,
    round_to: int | str | None = None,
) -> tuple[Gone, int | None]:
    """Return what has to go to reach a target, and the multiple of channels that was used.

    Args:
        target: What to reach.
        graph: The network.
        pick: What goes for a share of the channels and a multiple.
        round_to: A multiple, or "measured"; `None` is none, except that a `Latency` is measured.

    Raises:
        NoEffect: The target cannot be reached.
    """
    if round_to is None and isinstance(target, Latency):
        round_to = MEASURED
    if round_to == MEASURED:
        like = Macs(target.share)
        round_to = best_round_to(
            graph,
            lambda multiple: like.reach(graph, lambda ratio: pick(ratio, multiple)),
            batch_size=getattr(target, "batch_size", None),
            budget_s=getattr(target, "budget_s", 1.0),
        )
    assert not isinstance(round_to, str)
    return target.reach(graph, lambda ratio: pick(ratio, round_to)), round_to


def check_round_to(round_to: Any) -> None:
    """Raise unless `round_to` is a positive integer, "measured" or `None`."""
    if round_to not in (None, MEASURED) and (type(round_to) is not int or round_to < 1):
        raise ValueError(
            explain(
                "`round_to` is a positive number of channels, or 'measured'",
                repr(round_to),
                "pass 8, say",
            )
        )
