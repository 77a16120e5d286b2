"""Make the training of an existing LightningModule faster and its model smaller, and measure it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.bridge.restore import load_from_checkpoint
    from lightning_accel.compilation.callback import BlockCompile
    from lightning_accel.distillation.callback import Distillation
    from lightning_accel.distillation.module import DistillationModule
    from lightning_accel.measure.callback import AccelReport, StepMeter
    from lightning_accel.precision.plugin import AutocastPrecision
    from lightning_accel.pruning.callback import StructuredPruning
    from lightning_accel.pruning.mask.callback import WeightMasks
    from lightning_accel.pruning.sparsify.callback import SparsityTraining
    from lightning_accel.surgery.select import Select

__version__ = "0.1.0"

_HOMES = {
    "AutoTune": "tuning.callback",
    "tune": "tuning.outside",
    "AccelReport": "measure.callback",
    "AutocastPrecision": "precision.plugin",
    "BlockCompile": "compilation.callback",
    "Distillation": "distillation.callback",
    "DistillationModule": "distillation.module",
    "Select": "surgery.select",
    "SparsityTraining": "pruning.sparsify.callback",
    "StepMeter": "measure.callback",
    "StructuredPruning": "pruning.callback",
    "WeightMasks": "pruning.mask.callback",
    "load_from_checkpoint": "bridge.restore",
}

__all__ = [
    "AutoTune",
    "tune",
    "AccelReport",
    "AutocastPrecision",
    "BlockCompile",
    "Distillation",
    "DistillationModule",
    "Select",
    "SparsityTraining",
    "StepMeter",
    "StructuredPruning",
    "WeightMasks",
    "load_from_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
