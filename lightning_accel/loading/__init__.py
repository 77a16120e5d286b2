"""The same batches made faster: a dataset held in memory, other workers, pinned memory; measured."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily
from lightning_accel.loading.choose import Candidate, LoadingChoice, choose
from lightning_accel.loading.plan import LoadingPlan
from lightning_accel.loading.resident import ResidentLoader, resident
from lightning_accel.loading.workers import WorkerLoader, with_workers

if TYPE_CHECKING:
    from lightning_accel.loading.callbacks.fast_loading import (
        AppliedPlan,
        FastLoading,
        apply_choice,
    )

__all__ = [
    "AppliedPlan",
    "Candidate",
    "FastLoading",
    "LoadingChoice",
    "LoadingPlan",
    "ResidentLoader",
    "WorkerLoader",
    "apply_choice",
    "choose",
    "resident",
    "with_workers",
]


__getattr__ = lazily(
    __name__,
    {
        "AppliedPlan": "callbacks.fast_loading",
        "FastLoading": "callbacks.fast_loading",
        "apply_choice": "callbacks.fast_loading",
    },
)
