"""Every callback of this package, as `lightning.pytorch.callbacks` has Lightning's."""

from typing import TYPE_CHECKING

from lightning_accel import _HOMES
from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel import (
        AccelReport,
        ActivationBudget,
        ActivationCheckpointing,
        AttentionBackend,
        AutoTune,
        BlockCompile,
        Deploy,
        Distillation,
        FastLoading,
        Float8Linear,
        FrozenPredict,
        FusedOptimizer,
        LeanLoop,
        MatmulPrecision,
        MemoryFormat,
        Objective,
        PostTrainingQuantization,
        QuantizationAwareTraining,
        RankWatch,
        SparsityTraining,
        StepMeter,
        StructuredPruning,
        UsePrecision,
        WarmStart,
        WeightMasks,
    )

__all__ = [
    "AccelReport",
    "ActivationBudget",
    "ActivationCheckpointing",
    "AttentionBackend",
    "AutoTune",
    "BlockCompile",
    "Deploy",
    "Distillation",
    "FastLoading",
    "Float8Linear",
    "FrozenPredict",
    "FusedOptimizer",
    "LeanLoop",
    "MatmulPrecision",
    "MemoryFormat",
    "Objective",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "RankWatch",
    "SparsityTraining",
    "StepMeter",
    "StructuredPruning",
    "UsePrecision",
    "WarmStart",
    "WeightMasks",
]

__getattr__ = lazily("lightning_accel", {name: _HOMES[name] for name in __all__})
