"""Make the training of an existing LightningModule faster and its model smaller, and measure it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.bridge.restore import load_from_checkpoint
    from lightning_accel.compilation.callback import BlockCompile
    from lightning_accel.compilation.frozen.callback import FrozenPredict
    from lightning_accel.compilation.warm.callback import WarmStart
    from lightning_accel.distillation.callback import Distillation
    from lightning_accel.distillation.module import DistillationModule
    from lightning_accel.loading.callback import FastLoading
    from lightning_accel.loop.callback import FusedOptimizer, LeanLoop
    from lightning_accel.measure.callback import AccelReport, StepMeter
    from lightning_accel.memory.callback import ActivationBudget, ActivationCheckpointing
    from lightning_accel.precision.plugin import AutocastPrecision
    from lightning_accel.pruning.callback import StructuredPruning
    from lightning_accel.pruning.mask.callback import WeightMasks
    from lightning_accel.pruning.sparsify.callback import SparsityTraining
    from lightning_accel.surgery.select import Select
    from lightning_accel.tuning.callback import AutoTune
    from lightning_accel.tuning.outside import tune

__version__ = "0.1.0"

_HOMES = {
    "AccelReport": "measure.callback",
    "ActivationBudget": "memory.callback",
    "ActivationCheckpointing": "memory.callback",
    "AutoTune": "tuning.callback",
    "AutocastPrecision": "precision.plugin",
    "BlockCompile": "compilation.callback",
    "Distillation": "distillation.callback",
    "DistillationModule": "distillation.module",
    "FastLoading": "loading.callback",
    "FrozenPredict": "compilation.frozen.callback",
    "FusedOptimizer": "loop.callback",
    "LeanLoop": "loop.callback",
    "Select": "surgery.select",
    "SparsityTraining": "pruning.sparsify.callback",
    "StepMeter": "measure.callback",
    "StructuredPruning": "pruning.callback",
    "WarmStart": "compilation.warm.callback",
    "WeightMasks": "pruning.mask.callback",
    "load_from_checkpoint": "bridge.restore",
    "tune": "tuning.outside",
}

__all__ = [
    "AccelReport",
    "ActivationBudget",
    "ActivationCheckpointing",
    "AutoTune",
    "AutocastPrecision",
    "BlockCompile",
    "Distillation",
    "DistillationModule",
    "FastLoading",
    "FrozenPredict",
    "FusedOptimizer",
    "LeanLoop",
    "Select",
    "SparsityTraining",
    "StepMeter",
    "StructuredPruning",
    "WarmStart",
    "WeightMasks",
    "load_from_checkpoint",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
