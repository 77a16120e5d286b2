"""The same batches made faster: a dataset held in memory, other workers, pinned memory; measured."""

from typing import TYPE_CHECKING, Any

from lightning_accel.loading.choose import Choice, Way, choose
from lightning_accel.loading.plan import LoadingPlan
from lightning_accel.loading.resident import ResidentLoader, resident
from lightning_accel.loading.workers import WorkerLoader, with_workers

if TYPE_CHECKING:
    from lightning_accel.loading.callback import Applied, FastLoading, apply_choice

__all__ = [
    "Applied",
    "Choice",
    "FastLoading",
    "LoadingPlan",
    "ResidentLoader",
    "Way",
    "WorkerLoader",
    "apply_choice",
    "choose",
    "resident",
    "with_workers",
]


def __getattr__(name: str) -> Any:
    if name in ("Applied", "FastLoading", "apply_choice"):
        from lightning_accel.loading import callback

        return getattr(callback, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
