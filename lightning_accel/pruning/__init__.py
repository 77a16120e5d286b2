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
    from lightning_accel.pruning.callbacks.sparsity_training import SparsityTraining
    from lightning_accel.pruning.callbacks.structured_pruning import StructuredPruning
    from lightning_accel.pruning.callbacks.weight_masks import WeightMasks
    from lightning_accel.pruning.module import prune_before_sharding

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
    "StructuredPruning": "callbacks.structured_pruning",
    "WeightMasks": "callbacks.weight_masks",
    "SparsityTraining": "callbacks.sparsity_training",
    "prune_before_sharding": "module",
}


__getattr__ = lazily(__name__, _WITH_LIGHTNING)
