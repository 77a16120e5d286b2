"""Make the training of an existing LightningModule faster and its model smaller, and measure it."""

from typing import TYPE_CHECKING
from warnings import filterwarnings

from lightning_accel.after_import import after_import
from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.attention.callbacks.attention_backend import AttentionBackend
    from lightning_accel.bridge.objective import Objective
    from lightning_accel.bridge.restore import load_from_checkpoint
    from lightning_accel.compilation.callbacks.block_compile import BlockCompile
    from lightning_accel.compilation.callbacks.frozen_predict import FrozenPredict
    from lightning_accel.compilation.callbacks.warm_start import WarmStart
    from lightning_accel.devices.torch_accelerator import TorchAccelerator
    from lightning_accel.distillation.cache import TeacherCache
    from lightning_accel.distillation.callbacks.distillation import Distillation
    from lightning_accel.distillation.module import DistillationModule
    from lightning_accel.distillation.schedule import Schedule
    from lightning_accel.distillation.teacher import Teacher
    from lightning_accel.distillation.views import SeededViews
    from lightning_accel.export.bundle import Bundle, load_bundle
    from lightning_accel.export.callbacks.deploy import Deploy
    from lightning_accel.export.deploy import deploy
    from lightning_accel.loading.callbacks.fast_loading import FastLoading
    from lightning_accel.loop.callbacks.fused_optimizer import FusedOptimizer
    from lightning_accel.loop.callbacks.lean_loop import LeanLoop
    from lightning_accel.measure.callbacks.accel_report import AccelReport
    from lightning_accel.measure.callbacks.step_meter import StepMeter
    from lightning_accel.memory.callbacks.activation_budget import ActivationBudget
    from lightning_accel.memory.callbacks.activation_checkpointing import ActivationCheckpointing
    from lightning_accel.parallel.callbacks.rank_watch import RankWatch
    from lightning_accel.parallel.plugins.mpi_variables import MPIVariables
    from lightning_accel.parallel.strategies.accel_ddp_strategy import AccelDDPStrategy
    from lightning_accel.parallel.strategies.auto_strategy import AutoStrategy
    from lightning_accel.parallel.strategies.fsdp2_strategy import FSDP2Strategy
    from lightning_accel.parallel.strategies.tensor_parallel_strategy import TensorParallelStrategy
    from lightning_accel.precision.callbacks.float8_linear import Float8Linear
    from lightning_accel.precision.callbacks.matmul_precision import MatmulPrecision
    from lightning_accel.precision.callbacks.memory_format import MemoryFormat
    from lightning_accel.precision.callbacks.use_precision import UsePrecision
    from lightning_accel.precision.plugins.autocast_precision import AutocastPrecision
    from lightning_accel.precision.plugins.bf16_precision import Bf16Precision
    from lightning_accel.precision.plugins.xla_precision import XlaPrecision
    from lightning_accel.pruning.callbacks.sparsity_training import SparsityTraining
    from lightning_accel.pruning.callbacks.structured_pruning import StructuredPruning
    from lightning_accel.pruning.callbacks.weight_masks import WeightMasks
    from lightning_accel.pruning.module import prune_before_sharding
    from lightning_accel.pruning.prune import prune
    from lightning_accel.pruning.qubo import QuboSelector
    from lightning_accel.pruning.reconstruction import Reconstruction
    from lightning_accel.pruning.target import Latency, Macs, Memory, Params
    from lightning_accel.quantization.callbacks.post_training_quantization import (
        PostTrainingQuantization,
    )
    from lightning_accel.quantization.callbacks.quantization_aware_training import (
        QuantizationAwareTraining,
    )
    from lightning_accel.quantization.post_training import quantize, unquantize
    from lightning_accel.surgery.select import Select
    from lightning_accel.tuning.api import tune
    from lightning_accel.tuning.callbacks.auto_tune import AutoTune

__version__ = "0.1.0"

# Lightning 2.6.6 asks torch >= 2.13 in a deprecated way on every batch; at the end of the list, so
# that a filter of the user's own goes first. Remove with the first Lightning that asks anew.
filterwarnings(
    "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning, append=True
)

_HOMES = {
    "AccelDDPStrategy": "parallel.strategies.accel_ddp_strategy",
    "AccelReport": "measure.callbacks.accel_report",
    "ActivationBudget": "memory.callbacks.activation_budget",
    "ActivationCheckpointing": "memory.callbacks.activation_checkpointing",
    "AttentionBackend": "attention.callbacks.attention_backend",
    "AutoStrategy": "parallel.strategies.auto_strategy",
    "AutoTune": "tuning.callbacks.auto_tune",
    "AutocastPrecision": "precision.plugins.autocast_precision",
    "Bf16Precision": "precision.plugins.bf16_precision",
    "BlockCompile": "compilation.callbacks.block_compile",
    "Bundle": "export.bundle",
    "Deploy": "export.callbacks.deploy",
    "Distillation": "distillation.callbacks.distillation",
    "DistillationModule": "distillation.module",
    "FSDP2Strategy": "parallel.strategies.fsdp2_strategy",
    "FastLoading": "loading.callbacks.fast_loading",
    "Float8Linear": "precision.callbacks.float8_linear",
    "FrozenPredict": "compilation.callbacks.frozen_predict",
    "FusedOptimizer": "loop.callbacks.fused_optimizer",
    "Latency": "pruning.target",
    "LeanLoop": "loop.callbacks.lean_loop",
    "MPIVariables": "parallel.plugins.mpi_variables",
    "Macs": "pruning.target",
    "MatmulPrecision": "precision.callbacks.matmul_precision",
    "Memory": "pruning.target",
    "MemoryFormat": "precision.callbacks.memory_format",
    "Objective": "bridge.objective",
    "Params": "pruning.target",
    "PostTrainingQuantization": "quantization.callbacks.post_training_quantization",
    "QuantizationAwareTraining": "quantization.callbacks.quantization_aware_training",
    "QuboSelector": "pruning.qubo",
    "RankWatch": "parallel.callbacks.rank_watch",
    "Schedule": "distillation.schedule",
    "Reconstruction": "pruning.reconstruction",
    "SeededViews": "distillation.views",
    "Select": "surgery.select",
    "SparsityTraining": "pruning.callbacks.sparsity_training",
    "StepMeter": "measure.callbacks.step_meter",
    "StructuredPruning": "pruning.callbacks.structured_pruning",
    "Teacher": "distillation.teacher",
    "TeacherCache": "distillation.cache",
    "TensorParallelStrategy": "parallel.strategies.tensor_parallel_strategy",
    "TorchAccelerator": "devices.torch_accelerator",
    "UsePrecision": "precision.callbacks.use_precision",
    "WarmStart": "compilation.callbacks.warm_start",
    "WeightMasks": "pruning.callbacks.weight_masks",
    "XlaPrecision": "precision.plugins.xla_precision",
    "deploy": "export.deploy",
    "load_bundle": "export.bundle",
    "load_from_checkpoint": "bridge.restore",
    "prune": "pruning.prune",
    "prune_before_sharding": "pruning.module",
    "quantize": "quantization.post_training",
    "tune": "tuning.api",
    "unquantize": "quantization.post_training",
}

__all__ = [
    "AccelDDPStrategy",
    "AccelReport",
    "ActivationBudget",
    "ActivationCheckpointing",
    "AttentionBackend",
    "AutoStrategy",
    "AutoTune",
    "AutocastPrecision",
    "Bf16Precision",
    "BlockCompile",
    "Bundle",
    "Deploy",
    "Distillation",
    "DistillationModule",
    "FSDP2Strategy",
    "FastLoading",
    "Float8Linear",
    "FrozenPredict",
    "FusedOptimizer",
    "Latency",
    "LeanLoop",
    "MPIVariables",
    "Macs",
    "MatmulPrecision",
    "Memory",
    "MemoryFormat",
    "Objective",
    "Params",
    "PostTrainingQuantization",
    "QuantizationAwareTraining",
    "QuboSelector",
    "RankWatch",
    "Reconstruction",
    "Schedule",
    "SeededViews",
    "Select",
    "SparsityTraining",
    "StepMeter",
    "StructuredPruning",
    "Teacher",
    "TeacherCache",
    "TensorParallelStrategy",
    "TorchAccelerator",
    "UsePrecision",
    "WarmStart",
    "WeightMasks",
    "XlaPrecision",
    "deploy",
    "load_bundle",
    "load_from_checkpoint",
    "prune",
    "prune_before_sharding",
    "quantize",
    "tune",
    "unquantize",
]


__getattr__ = lazily(__name__, _HOMES)


def _load_all() -> None:
    for name in __all__:
        __getattr__(name)


def _register_strategies() -> None:
    from lightning_accel.parallel.strategy_names import register

    register()


def _register_accelerator() -> None:
    from lightning_accel.devices.torch_accelerator import register

    register()


after_import("lightning.pytorch.cli", _load_all)
after_import("lightning.pytorch.strategies", _register_strategies)
after_import("lightning.pytorch.accelerators", _register_accelerator)
