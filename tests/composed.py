"""Every technique at work, for runs under every strategy: one row each, and what is compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sharded import GPT, Adam, Fixed, Manual
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.strategies import AccelDDPStrategy, FSDP2Strategy, TensorParallelStrategy

EPOCHS, BATCHES, SAVED = 3, 2, 1
"""Each technique acts before the epoch of which the file is, and the last epoch is run again from the file."""


class Net(GPT):
    """A GPT of two blocks in float64, whose files say so."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.double()


class ByHand(Manual):
    """Two optimizers by hand, toggled, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = self.blocks[:2]
        self.double()


class Single(GPT):
    """In float32, for techniques that change nothing else."""

    def __init__(self) -> None:
        super().__init__(depth=2)
        self.float()


class Row(NamedTuple):
    """Arguments of a Trainer with a technique, and how exact it is."""

    make: Callable[[Path], dict[str, Any]]
    module: type[GPT] = Net
    exact: bool = True
    """Whether numbers are those of float64; else of 16 bits, where other shares of a batch round otherwise."""
    beside: tuple[str, ...] = ()


def alone(*make: Callable[[], Any], **more: Any) -> Row:
    return Row(lambda _: {"callbacks": [one() for one in make]}, **more)


def plugin(make: Callable[[], Any], **more: Any) -> Row:
    return Row(lambda _: {"plugins": [make()]}, **more)


def taught(losses: Any, **more: Any) -> Any:
    return lambda: la.Distillation(la.Teacher(_teacher(), precision="same"), losses, **more)


def _teacher() -> GPT:
    torch.manual_seed(3)
    return Adam().double()


def compiles() -> Any:
    return la.BlockCompile(backend="aot_eager")


HINT = {"hint": {"loss": "fitnet", "layers": "blocks.1", "weight": 1e-2}}
ROWS: dict[str, Row] = {
    "none": alone(),
    "prune": alone(lambda: la.StructuredPruning(ratio=0.5, when=1, compensate=False)),
    "masks": alone(lambda: la.WeightMasks(0.5, when=1)),
    "masks 2:4": alone(lambda: la.WeightMasks(pattern="2:4")),
    "masks, by hand": alone(lambda: la.WeightMasks(0.5, when=1), module=ByHand),
    "masks, pruned": alone(
        lambda: la.WeightMasks(0.5),
        lambda: la.StructuredPruning(ratio=0.5, when=1, compensate=False),
    ),
    "quantize": alone(lambda: la.QuantizationAwareTraining(when=1)),
    "quantize after": alone(lambda: la.PostTrainingQuantization(batches=2)),
    "sparsity": alone(lambda: la.SparsityTraining("group_lasso", strength=1e-2)),
    "sparsity, growing": alone(
        lambda: la.SparsityTraining("growing", strength=0.1, every_n_steps=1)
    ),
    "sparsity, by hand": alone(
        lambda: la.SparsityTraining("group_lasso", strength=1e-2), module=ByHand
    ),
    "distill": alone(taught("kd")),
    "distill hints": alone(taught(HINT)),
    "distill itself": alone(
        lambda: la.StructuredPruning(ratio=0.5, when=1, compensate=False),
        lambda: la.Distillation("self", "kd"),
    ),
    "distill, pruned": alone(
        lambda: la.StructuredPruning(ratio=0.5, when=1, compensate=False), taught("kd")
    ),
    "loading": alone(lambda: la.FastLoading(budget_s=0.01)),
    "rows": alone(lambda: la.FastLoading(num_workers=False, pin_memory=False, budget_s=0.01)),
    "measure": alone(la.StepMeter),
    "report": Row(lambda f: {"callbacks": [la.AccelReport(budget_s=0.01, path=f / "report.json")]}),
    "lean": alone(la.LeanLoop),
    "optimizer": alone(lambda: la.FusedOptimizer("foreach")),
    "optimizer fused": alone(lambda: la.FusedOptimizer("fused")),
    "checkpointing": alone(la.ActivationCheckpointing),
    "compile": alone(compiles),
    "budget": alone(compiles, lambda: la.ActivationBudget(0.5)),
    "tune": alone(
        lambda: la.AutoTune(
            budget_s=0.2, budget_share=1e9, techniques=["fused_optimizer"], cache=False
        )
    ),
    "attention": alone(lambda: la.AttentionBackend("math")),
    "matmul": alone(lambda: la.MatmulPrecision("highest")),
    "warm": Row(lambda f: {"callbacks": [la.WarmStart(f / "compiled.zip"), compiles()]}),
    "frozen": alone(lambda: la.FrozenPredict(backend="eager")),
    "objective": alone(lambda: la.Objective("val")),
    "fp32": plugin(lambda: la.AutocastPrecision("32-true")),
    "bf16": plugin(lambda: la.AutocastPrecision("bf16-mixed"), module=Single, exact=False),
    "use bf16": alone(
        lambda: la.UsePrecision(la.AutocastPrecision("bf16-mixed")), module=Single, exact=False
    ),
    "bf16 weights": plugin(lambda: la.Bf16Precision("master"), module=Single, exact=False),
}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "accel_ddp": AccelDDPStrategy,
    "accel_fsdp": FSDP2Strategy,
    "accel_tensor": TensorParallelStrategy,
}


def rows_of(rank: int, world: int) -> DataLoader[Any]:
    """Each process gets its rows of every global batch."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 24, (8 * BATCHES, 9), generator=generator)
    part = 8 // world
    rows = [[*range(8 * i + rank * part, 8 * i + (rank + 1) * part)] for i in range(BATCHES)]
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_sampler=Fixed(rows))
