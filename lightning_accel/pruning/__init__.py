"""Structured pruning: remove whole channels and heads, so that the network is really smaller."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_accel.pruning.prune import plan, prune
from lightning_accel.pruning.recalibrate import recalibrate
from lightning_accel.pruning.target import Latency, Macs, Memory, Params
from lightning_accel.pruning.verify import mask_equivalence

if TYPE_CHECKING:
    from lightning_accel.pruning.callback import StructuredPruning
    from lightning_accel.pruning.mask.callback import WeightMasks
    from lightning_accel.pruning.sparsify.callback import SparsityTraining

__all__ = [
    "Latency",
    "Macs",
    "Memory",
    "Params",
    "SparsityTraining",
    "StructuredPruning",
    "WeightMasks",
    "mask_equivalence",
    "plan",
    "prune",
    "recalibrate",
]

_CALLBACKS = {
    "StructuredPruning": "callback",
    "WeightMasks": "mask.callback",
    "SparsityTraining": "sparsify.callback",
}


def __getattr__(name: str) -> Any:
    if name in _CALLBACKS:
        return getattr(import_module(f"{__name__}.{_CALLBACKS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
