"""Make the training of an existing LightningModule faster and its model smaller, and measure it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import filterwarnings

from lightning_accel.shortnames import load_beside_cli

if TYPE_CHECKING:
    from lightning_accel.attention.callback import AttentionBackend
    from lightning_accel.bridge.objective import Objective
    from lightning_accel.bridge.restore import load_from_checkpoint
    from lightning_accel.compilation.callback import BlockCompile
    from lightning_accel.compilation.frozen.callback import FrozenPredict
    from lightning_accel.compilation.warm.callback import WarmStart
    from lightning_accel.distillation.cache import TeacherCache
    from lightning_accel.distillation.callback import Distillation
    from lightning_accel.distillation.module import DistillationModule
    from lightning_accel.distillation.schedule import Ramp
    from lightning_accel.distillation.teacher import Teacher
    from lightning_accel.distillation.views import SeededViews
    from lightning_accel.loading.callback import FastLoading
    from lightning_accel.loop.callback import FusedOptimizer, LeanLoop
    from lightning_accel.measure.callback import AccelReport
    from lightning_accel.measure.meter.callback import StepMeter
    from lightning_accel.memory.callback import ActivationBudget, ActivationCheckpointing
    from lightning_accel.precision.callback import (
        Float8Linear,
        MatmulPrecision,
        MemoryFormat,
        UsePrecision,
    )
    from lightning_accel.precision.plugin import AutocastPrecision
    from lightning_accel.precision.true.plugin import Bf16Precision, XlaPrecision
    from lightning_accel.pruning.callback import StructuredPruning
    from lightning_accel.pruning.mask.callback import WeightMasks
    from lightning_accel.pruning.module import prune_before_sharding
    from lightning_accel.pruning.prune import prune
    from lightning_accel.pruning.qubo import QuboSelector
    from lightning_accel.pruning.reconstruction import Reconstruction
    from lightning_accel.pruning.sparsify.callback import SparsityTraining
    from lightning_accel.pruning.target import Latency, Macs, Memory, Params
    from lightning_accel.surgery.select import Select
    from lightning_accel.tuning.callback import AutoTune
    from lightning_accel.tuning.outside import tune

__version__ = "0.1.0"

# Lightning 2.6.6 asks torch >= 2.13 in a deprecated way on every batch; at the end of the list, so
# that a filter of the user's own goes first. Remove with the first Lightning that asks anew.
filterwarnings(
    "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning, append=True
)

_HOMES = {
    "AccelReport": "measure.callback",
    "ActivationBudget": "memory.callback",
    "ActivationCheckpointing": "memory.callback",
    "AttentionBackend": "attention.callback",
    "AutoTune": "tuning.callback",
    "AutocastPrecision": "precision.plugin",
    "Bf16Precision": "precision.true.plugin",
    "BlockCompile": "compilation.callback",
    "Distillation": "distillation.callback",
    "DistillationModule": "distillation.module",
    "FastLoading": "loading.callback",
    "Float8Linear": "precision.callback",
    "FrozenPredict": "compilation.frozen.callback",
    "FusedOptimizer": "loop.callback",
    "Latency": "pruning.target",
    "LeanLoop": "loop.callback",
    "Macs": "pruning.target",
    "MatmulPrecision": "precision.callback",
    "Memory": "pruning.target",
    "MemoryFormat": "precision.callback",
    "Objective": "bridge.objective",
    "Params": "pruning.target",
    "QuboSelector": "pruning.qubo",
    "Ramp": "distillation.schedule",
    "Reconstruction": "pruning.reconstruction",
    "SeededViews": "distillation.views",
    "Select": "surgery.select",
    "SparsityTraining": "pruning.sparsify.callback",
    "StepMeter": "measure.meter.callback",
    "StructuredPruning": "pruning.callback",
    "Teacher": "distillation.teacher",
    "TeacherCache": "distillation.cache",
    "UsePrecision": "precision.callback",
    "WarmStart": "compilation.warm.callback",
    "WeightMasks": "pruning.mask.callback",
    "XlaPrecision": "precision.true.plugin",
    "load_from_checkpoint": "bridge.restore",
    "prune": "pruning.prune",
    "prune_before_sharding": "pruning.module",
    "tune": "tuning.outside",
}

__all__ = [
    "AccelReport",
    "ActivationBudget",
    "ActivationCheckpointing",
    "AttentionBackend",
    "AutoTune",
    "AutocastPrecision",
    "Bf16Precision",
    "BlockCompile",
    "Distillation",
    "DistillationModule",
    "FastLoading",
    "Float8Linear",
    "FrozenPredict",
    "FusedOptimizer",
    "Latency",
    "LeanLoop",
    "Macs",
    "MatmulPrecision",
    "Memory",
    "MemoryFormat",
    "Objective",
    "Params",
    "QuboSelector",
    "Ramp",
    "Reconstruction",
    "SeededViews",
    "Select",
    "SparsityTraining",
    "StepMeter",
    "StructuredPruning",
    "Teacher",
    "TeacherCache",
    "UsePrecision",
    "WarmStart",
    "WeightMasks",
    "XlaPrecision",
    "load_from_checkpoint",
    "prune",
    "prune_before_sharding",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def _load_all() -> None:
    for name in __all__:
        __getattr__(name)


load_beside_cli(_load_all)
