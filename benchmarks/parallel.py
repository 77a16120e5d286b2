"""What sharding saves and costs: `FSDP2Strategy` of a plain module, against `fully_shard` by hand and Lightning's DDP.

Two processes over gloo on this machine, all sides interleaved in blocks of steps. Memory is what stays on a process
after a step: parameters, gradients and optimizer states, counted from the tensors themselves.

    python benchmarks/parallel.py [--blocks 12] [--steps 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from lightning_accel.strategies import FSDP2Strategy

SIDES = ("ddp", "by hand", "ours")


class GPT(LightningModule):
    """Eight blocks of width 256; 7 million parameters."""

    def __init__(self, depth: int = 8, width: int = 256, vocabulary: int = 1024) -> None:
        super().__init__()
        self.tok = nn.Embedding(vocabulary, width)
        kind = {
            "nhead": 4,
            "dim_feedforward": 4 * width,
            "dropout": 0.0,
            "batch_first": True,
            "norm_first": True,
        }
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, **kind) for _ in range(depth))  # type: ignore[arg-type]
        self.head = nn.Linear(width, vocabulary)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = self.tok(batch)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch.flatten())

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-4)


class ByHand(GPT):
    """The same, sharded by someone who knows how: one unit per block, then the root."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(self, "training_step")  # type: ignore[arg-type]


def strategy(side: str) -> Any:
    if side == "ddp":
        return DDPStrategy(process_group_backend="gloo")
    if side == "by hand":
        return ModelParallelStrategy(2, 1, process_group_backend="gloo")
    return FSDP2Strategy(process_group_backend="gloo")


def batches(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(int(os.environ["LOCAL_RANK"]))
    for _ in range(count):
        yield torch.randint(0, 1024, (4, 64), generator=generator)


def measured(name: str, steps: int) -> tuple[float, dict[str, int]]:
    """Fit for some steps, the first one apart, and return seconds per step and bytes that stay."""
    torch.manual_seed(0)
    module = (ByHand if name == "by hand" else GPT)()
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=strategy(name), logger=False, max_epochs=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    times, start, kept = list[float](), [0.0], dict[str, int]()

    class Clock(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            for index, batch in enumerate(batches(steps + 2)):
                if (
                    index == 2
                ):  # the second step has begun optimizer states and gathered everything once
                    dist.barrier()
                    start[0] = time.perf_counter()
                yield batch
            dist.barrier()
            times.append((time.perf_counter() - start[0]) / steps)
            kept.update(bytes_of(module, trainer.optimizers[0]))

    trainer.fit(module, torch.utils.data.DataLoader(Clock(), batch_size=None))
    return times[0], kept


def bytes_of(module: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    def size(tensors: Any) -> int:
        local = [getattr(t, "_local_tensor", t) for t in tensors if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in local)

    parameters = list(module.parameters())
    states = [v for entry in optimizer.state.values() for v in entry.values()]
    return {
        "parameters": size(parameters),
        "gradients": size(p.grad for p in parameters),
        "optimizer": size(states),
    }


def rank(arguments: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    kept: dict[str, dict[str, int]] = {}
    for turn in range(arguments.blocks):
        order = SIDES if turn % 2 else SIDES[::-1]
        for side in order:
            seconds, kept[side] = measured(side, arguments.steps)
            times[side].append(seconds)
    if os.environ["LOCAL_RANK"] == "0":
        report(times, kept, arguments.json)


def report(
    times: dict[str, list[float]], kept: dict[str, dict[str, int]], path: str | None
) -> None:
    rows = {}
    for side in SIDES:
        ratios = sorted(a / b for a, b in zip(times[side], times["by hand"], strict=True))
        total = sum(kept[side].values())
        rows[side] = {
            "ms": 1000 * statistics.median(times[side]),
            "to_by_hand": statistics.median(ratios),
            "quartiles": (ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]),
            "megabytes": total / 1e6,
            **{name: size / 1e6 for name, size in kept[side].items()},
        }
        low, high = rows[side]["quartiles"]  # type: ignore[misc]
        print(
            f"{side:8s} {rows[side]['ms']:7.1f} ms   {rows[side]['to_by_hand']:.3f} of by hand "
            f"({low:.3f} to {high:.3f})   stays {total / 1e6:6.1f} MB: "
            + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in kept[side].items())
        )
    if path:
        with open(path, "w") as file:
            json.dump(rows, file, indent=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        rank(arguments)
        return
    run_twice()


def run_twice() -> None:
    """Run this script in two processes that find each other, and end as the worse of them does."""
    port = str(20_000 + os.getpid() % 20_000)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env={**os.environ, **common, "LOCAL_RANK": n})
        for n in "01"
    ]
    raise SystemExit(max(process.wait() for process in ranks))


if __name__ == "__main__":
    main()
