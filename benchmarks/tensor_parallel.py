"""What splitting layers saves and costs: `TensorParallelStrategy` of a plain module, against torch's plan by hand and one process.

Two processes over gloo on this machine, which see the same batches, all sides interleaved in blocks of steps. By hand is
`parallelize_module` with a plan of names under Lightning's own strategy. "whole" is the same network on one process, with the
other core idle. Memory is what stays on a process after a step, counted from the tensors.

    python benchmarks/tensor_parallel.py [--blocks 8] [--steps 6]
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from parallel import bytes_of, run_twice
from torch import Tensor, nn
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.optim import Optimizer

from lightning_accel.strategies import TensorParallelStrategy

SIDES = ("whole", "by hand", "ours")


class Block(nn.Module):
    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        heads = [
            f(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.q, self.k, self.v)
        ]
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.n2(x))))


class GPT(LightningModule):
    """Six blocks of width 384; 11 million parameters."""

    def __init__(self, depth: int = 6, width: int = 384, vocabulary: int = 512) -> None:
        super().__init__()
        self.tok, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.blocks = nn.ModuleList(Block(width, 64) for _ in range(depth))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch).flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4, foreach=False)


class ByHand(GPT):
    """The same, split by someone who knows the names of its layers."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["tensor_parallel"]
        columns = dict.fromkeys(("q", "k", "v", "up"), ColwiseParallel())
        plan = {**columns, "o": RowwiseParallel(), "down": RowwiseParallel()}
        for block in self.blocks:
            parallelize_module(block, mesh, plan)  # type: ignore[arg-type]


def given(side: str) -> dict[str, Any]:
    if side == "whole":
        return {"devices": 1}
    if side == "by hand":
        return {"devices": 2, "strategy": ModelParallelStrategy(1, 2, process_group_backend="gloo")}
    return {"devices": 2, "strategy": TensorParallelStrategy(process_group_backend="gloo")}


class Batches(torch.utils.data.Dataset[Tensor]):
    """The same on all processes."""

    def __init__(self, steps: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.batches = torch.randint(0, 512, (steps + 2, 8, 64), generator=generator)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        return self.batches[index]


class Clock(Callback):
    """Measures all steps but the first two, in which optimizer states begin."""

    def __init__(self) -> None:
        self.start, self.took, self.kept = 0.0, 0.0, dict[str, int]()

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 2:
            self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.took = time.perf_counter() - self.start
        self.kept = bytes_of(pl_module, trainer.optimizers[0])


def measured(side: str, steps: int) -> tuple[float, dict[str, int]]:
    torch.manual_seed(0)
    module, clock = (ByHand if side == "by hand" else GPT)(), Clock()
    trainer = Trainer(
        accelerator="cpu", logger=False, max_epochs=1, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, callbacks=[clock], **given(side),
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Batches(steps), batch_size=None))
    return clock.took / steps, clock.kept


def rank(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    first = os.environ["LOCAL_RANK"] == "0"
    dist.init_process_group("gloo", rank=0 if first else 1, world_size=2)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    kept: dict[str, dict[str, int]] = {}
    for turn in range(arguments.blocks):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            dist.barrier()
            if side != "whole" or first:
                seconds, kept[side] = measured(side, arguments.steps)
                times[side].append(seconds)
            dist.barrier()
    if first:
        for side in SIDES:
            ratios = sorted(a / b for a, b in zip(times[side], times["by hand"], strict=True))
            low, high = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
            print(
                f"{side:8s} {1000 * statistics.median(times[side]):7.1f} ms   {statistics.median(ratios):.3f} of by hand "
                f"({low:.3f} to {high:.3f})   stays {sum(kept[side].values()) / 1e6:6.1f} MB"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    arguments = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        rank(arguments)
        return
    run_twice()


if __name__ == "__main__":
    main()
