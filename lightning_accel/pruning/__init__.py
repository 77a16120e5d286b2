"""Structured pruning: remove whole channels and heads, so that the network is really smaller."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily
from lightning_accel.pruning.prune import plan, prune
from lightning_accel.pruning.qubo import QuboSelector
from lightning_accel.pruning.recalibrate import recalibrate
from lightning_accel.pruning.reconstruction import GreedySwapSelector, Reconstruction
from lightning_accel.pruning.spelled import TorchPruner
from lightning_accel.pruning.target import Latency, Macs, Memory, Params
from lightning_accel.pruning.verify import mask_equivalence

if TYPE_CHECKING:
    from lightning_accel.pruning.callback import StructuredPruning
    from lightning_accel.pruning.mask.callback import WeightMasks
    from lightning_accel.pruning.module import prune_before_sharding
    from lightning_accel.pruning.sparsify.callback import SparsityTraining

__all__ = [
    "GreedySwapSelector",
    "Latency",
    "Macs",
    "Memory",
    "Params",
    "QuboSelector",
    "Reconstruction",
    "SparsityTraining",
    "StructuredPruning",
    "TorchPruner",
    "WeightMasks",
    "mask_equivalence",
    "plan",
    "prune",
    "prune_before_sharding",
    "recalibrate",
]

_WITH_LIGHTNING = {
    "StructuredPruning": "callback",
    "WeightMasks": "mask.callback",
    "SparsityTraining": "sparsify.callback",
    "prune_before_sharding": "module",
}


__getattr__ = lazily(__name__, _WITH_LIGHTNING)
