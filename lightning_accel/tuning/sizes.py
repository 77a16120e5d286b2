"""Samples per second of other batch sizes, for those who ask: the choice changes training, so it stays theirs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_accel.measure.race import BenchmarkCase, p10, run
from lightning_accel.measure.subject import num_samples
from lightning_accel.tuning.benchmark_pool import error_text
from lightning_accel.tuning.replica import Replica
from lightning_accel.tuning.report import BatchRate
from lightning_accel.tuning.settings import Settings

_LONGEST_S = 30.0


def measure_sizes(
    build: Callable[[Settings, list[Any] | None], Replica],
    batches: list[Any],
    sizes: Sequence[int],
    settings: Settings,
    budget_s: float,
) -> list[BatchRate]:
    """Measure training steps of other batch sizes, made by repeating or cutting the batches at hand.

    Args:
        build: Makes a copy of the module under settings and batches.
        batches: Batches in place.
        sizes: Batch sizes; one that runs out of memory is reported and not taken.
        settings: What to measure them under.
        budget_s: About how long in all.
    """
    budget_s = min(budget_s, _LONGEST_S)  # also where the search itself may last for ever
    rates = []
    cases: dict[str, BenchmarkCase] = {}
    for size in sizes:
        try:
            resized = [resize(batch, size) for batch in batches]
            replica = build(settings, resized)
            start = time.perf_counter()
            replica.first_step()
            case = BenchmarkCase(replica.step, replica.device, around=replica.around, warmup=1)
            run({"": case}, budget_s=max(0.0, budget_s / len(sizes) - time.perf_counter() + start))
            cases[str(size)] = case
            rates.append(BatchRate(size, size / p10(case)))
        except Exception as error:
            rates.append(BatchRate(size, None, error_text(error)))
            error.__traceback__ = None
    return rates


def resize(batch: Any, size: int) -> Any:
    """Return a batch of another size: its samples again and again, or the first of them.

    >>> resize([torch.arange(3), "name"], 5)
    [tensor([0, 1, 2, 0, 1]), 'name']
    """
    present = num_samples(batch)
    if present is None:
        raise ValueError(f"the batch has no tensor whose first dimension could be {size}")
    rows = torch.arange(size) % present

    def taken(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == present:
            return value.index_select(0, rows.to(value.device))
        return value

    return tree_map(taken, batch)
