"""Every technique at work, for runs under every strategy: one row each, and what is compared."""

from __future__ import annotations

import re
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
    within: float = 1e-11
    """How far weights and losses may be from those of one process: rounding in float64, or in shorter formats."""
    evaluates: bool = False
    """Whether it is for a Trainer that evaluates, and refuses to fit."""
    leaves: bool = False
    """Whether what it leaves at the end is in no file of the fit."""


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
    "quantize": alone(lambda: la.QuantizationAwareTraining(when=1), within=1e-8),
    "quantize after": alone(
        lambda: la.PostTrainingQuantization(
            "int8", None, rounding="nearest", correct_bias=False, batches=2
        ),
        leaves=True,
    ),
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
    "watch": alone(la.RankWatch),
    "warm": Row(lambda f: {"callbacks": [la.WarmStart(f / "compiled.zip"), compiles()]}),
    "frozen": alone(lambda: la.FrozenPredict(backend="eager"), evaluates=True),
    "objective": alone(lambda: la.Objective("val")),
    "fp32": plugin(lambda: la.AutocastPrecision("32-true")),
    "bf16": plugin(lambda: la.AutocastPrecision("bf16-mixed"), module=Single, within=2e-3),
    "use bf16": alone(
        lambda: la.UsePrecision(la.AutocastPrecision("bf16-mixed")), module=Single, within=2e-3
    ),
    "bf16 weights": plugin(lambda: la.Bf16Precision("master"), module=Single, within=2e-2),
}
TEAMS: dict[str, tuple[str, ...]] = {
    "pruned": ("prune", "loading", "measure", "lean", "attention", "checkpointing"),
    "masked": ("masks, pruned", "optimizer", "matmul", "watch", "objective"),
    "taught by itself": ("distill itself", "rows"),
    "taught": ("distill hints", "sparsity", "fp32"),
    "quantized": ("quantize",),
    "compiled": ("compile", "warm"),
    "by hand": ("masks, by hand", "sparsity, by hand"),
    "short": ("use bf16",),
}
"""Rows that are tried together where there is little time: what is right alone is right in company."""
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "accel_ddp": AccelDDPStrategy,
    "accel_fsdp": FSDP2Strategy,
    "accel_tensor": TensorParallelStrategy,
}
ON_FOUR: dict[str, Callable[[], Any]] = {
    "accel_fsdp_tensor": lambda: TensorParallelStrategy(tensor_parallel_size=2)
}
FEW = ("none", "prune", "masks", "sparsity", "distill", "compile", "use bf16", "tune")
"""Rows that are tried on four processes too."""


def together(name: str) -> Row:
    """Return a row, or a team as one."""
    if name in ROWS:
        return ROWS[name]
    rows = [ROWS[one] for one in TEAMS[name]]

    def make(folder: Path) -> dict[str, Any]:
        parts = [row.make(folder) for row in rows]
        return {
            k: [one for part in parts for one in part.get(k, [])] for k in ("callbacks", "plugins")
        }

    return rows[0]._replace(make=make, within=max(row.within for row in rows))


HEAD = """# Every technique under every strategy

Written by `python docs/matrix.py` from a run; do not edit it by hand. Two processes (2 x 2 for `accel_fsdp_tensor`) against one
process that sees the batches of all, GPT of two blocks in float64 with momentum. "equal": weights after a fit, what validation
logs in each epoch and after it, the fit gone on with from a file under the same strategy, from the strategy's file in one
process, and from one process's file under the strategy, and the last file loaded in one process: each within rounding (on four
processes the fit, a fit from one process's file, and loading). In 16 bits: within 0.002, of bfloat16 weights within 0.02.
Anything else is refused at the start of the fit.

What a technique learns from batches it learns from those of the first process (compensation of a prune, calibration of a
quantization, importance by gradients): with these, results are those of its share of the data, the same on all processes.
Not here: `Float8Linear` and `XlaPrecision`, which need other hardware, `MemoryFormat`, which changes no number, and `Deploy`,
which acts after the fit.

"""


def page(results: dict[str, dict[str, Any]]) -> str:
    """Return the page of what a run found, by row and strategy."""
    strategies = [*STRATEGIES, *ON_FOUR]
    said: list[str] = []
    lines = [
        f"| technique | {' | '.join(f'`{s}`' for s in strategies)} |",
        "|---" * (len(strategies) + 1) + "|",
    ]
    for name in ROWS:
        words = []
        for strategy in strategies:
            word = verdict(name, results[name].get(strategy))
            if word.startswith("refused: "):
                why = word.removeprefix("refused: ")
                if why not in said:
                    said.append(why)
                word = f"refused ({said.index(why) + 1})"
            words.append(word)
        lines.append(f"| {name} | {' | '.join(words)} |")
    notes = [f"{n}. {why}" for n, why in enumerate(said, 1)]
    return HEAD + "\n".join(lines) + "\n\nWhy, and what to do:\n\n" + "\n".join(notes) + "\n"


def read(page: str) -> dict[tuple[str, str], str]:
    """Return what a page says, by row and strategy, with the reasons in place of their numbers."""
    why = dict(re.findall(r"^(\d+)\. (.*)$", page, re.M))
    head, _, *lines = re.findall(r"^\|.*\|$", page, re.M)
    strategies = [cell.strip(" `") for cell in head.split("|")[2:-1]]
    words = {}
    for line in lines:
        name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
        for strategy, cell in zip(strategies, cells, strict=True):
            number = re.search(r"\((\d+)\)", cell)
            words[name, strategy] = f"refused: {why[number[1]]}" if number else cell
    return words


def verdict(name: str, cell: dict[str, Any] | None) -> str:
    """Say what was found: "equal", "refused: why", or what is wrong."""
    if cell is None:
        return "-"
    errors = [v for v in cell.values() if "error" in v]
    if errors and all(v["refused"] for v in errors) and "error" in cell["fit"]:
        why = errors[0]["error"].partition(": ")[2]
        return f"refused: {re.sub(r'torch [0-9][^ ]*', 'torch', why)}"
    if errors:
        return f"WRONG: {errors[0]['error'][:200]}"
    apart = max(max(v["weights"], v["logged"]) for v in cell.values())
    few = together(name).within
    return "equal" if apart <= few else f"WRONG: {apart:.1e} apart"


def rows_of(rank: int, world: int) -> DataLoader[Any]:
    """Each process gets its rows of every global batch."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 24, (8 * BATCHES, 9), generator=generator)
    part = 8 // world
    rows = [[*range(8 * i + rank * part, 8 * i + (rank + 1) * part)] for i in range(BATCHES)]
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_sampler=Fixed(rows))
