"""What single techniques give on one GPU, a part at a time: each side a fit by the Trainer, in turns, in one process.

A part has its plain side first and again last, and the two tell what it can resolve. Rows are JSON lines: seconds per
step (the shortest of some turns), the ratio to the plain side, the peak of the allocator, and the last loss, by which
a side that computes something else is seen. gpu_day.sh runs all parts, each in a process of its own.

    python benchmarks/gpu_parts.py fsdp|graphs|scaler|resident|streams|float8|attention|compile [--device cuda]
    python benchmarks/gpu_parts.py compile --tiny --device cpu

The second runs every path with tiny sizes, and means nothing. Exit code 2 without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_nets import CASES
from lanes import about, quiet
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from nets import GPT as Decoder
from nets import Benchmark
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_accel import (
    AttentionBackend,
    BlockCompile,
    FastLoading,
    Float8Linear,
    FSDP2Strategy,
)

MIXED = {"precision": "bf16-mixed"}


class Side(NamedTuple):
    """One way to train: a network, arguments of the Trainer, its callbacks, and what must be there."""

    net: Callable[[bool], Benchmark]
    given: Callable[[], dict[str, Any]] = dict
    callbacks: Callable[[], list[Callback]] = list
    needs: str = ""
    loads: str = "held"


class Clock(Callback):
    """Times the steps between the warm-up and the end, waiting for the device at both."""

    def __init__(self, device: str, warm_up: int, steps: int) -> None:
        self.device, self.warm_up, self.steps = device, warm_up, steps
        self.step_s, self.loss, self._start = float("nan"), float("nan"), 0.0

    @override
    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.warm_up:
            self._start = _now(self.device)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any
    ) -> None:
        if trainer.global_step == self.warm_up + self.steps:
            self.step_s = (_now(self.device) - self._start) / self.steps
            self.loss = float(outputs["loss"])


class ByHand(LightningModule):
    """A network sharded by someone who knows how: a unit per block, then the root."""

    def __init__(self, net: Benchmark) -> None:
        super().__init__()
        self.inner = net

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for block in self.inner.net.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh, reshard_after_forward=False)
        register_fsdp_forward_method(self, "training_step")

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.inner.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def _case(name: str) -> Callable[[bool], Benchmark]:
    return lambda tiny: (CASES[name].tiny if tiny else CASES[name].make)()


def _untied(tiny: bool) -> Benchmark:
    """Return a GPT without ties, which `fully_shard` by hand would untie."""
    return (
        Decoder(32, 2, 2, 16, 64, batch_size=2)
        if tiny
        else Decoder(768, 12, 12, 1024, 50304, batch_size=32)
    )


GPT, CIFAR, MLP = _case("gpt_124m"), _case("cifar"), _case("mlp")
WIDE = _case("gpt_1b")


def _attending(kernel: str, needs: str = "") -> Side:
    return Side(GPT, lambda: MIXED, lambda: [AttentionBackend(kernel)], needs)


PARTS: dict[str, dict[str, Side]] = {
    "fsdp": {
        "plain": Side(_untied, lambda: MIXED),
        "by hand": Side(
            lambda tiny: ByHand(_untied(tiny)),  # type: ignore[arg-type,return-value]
            lambda: {**MIXED, "strategy": ModelParallelStrategy(1, 1)},
        ),
        "FSDP2Strategy": Side(_untied, lambda: {**MIXED, "strategy": FSDP2Strategy()}),
    },
    "graphs": {
        "plain": Side(MLP),
        "compiled": Side(MLP, callbacks=lambda: [BlockCompile(blocks=False)]),
        "CUDA graphs": Side(
            MLP,
            callbacks=lambda: [BlockCompile(blocks=False, mode="reduce-overhead")],
            needs="cuda",
        ),
    },
    "scaler": {
        "plain": Side(CIFAR),
        "Lightning's 16-mixed": Side(CIFAR, lambda: {"precision": "16-mixed"}, needs="cuda"),
        "AutocastPrecision": Side(CIFAR, lambda: {"plugins": [_scaled()]}, needs="cuda"),
    },
    "resident": {
        "plain": Side(CIFAR, loads="items"),
        "on the device": Side(
            CIFAR, callbacks=lambda: [FastLoading(True, False, False)], loads="items"
        ),
        "chosen": Side(CIFAR, callbacks=lambda: [FastLoading(budget_s=2.0)], loads="items"),
    },
    "streams": {
        "plain": Side(CIFAR, lambda: MIXED, loads="host"),
        "pinned": Side(CIFAR, lambda: MIXED, loads="pinned", needs="cuda"),
    },
    "float8": {
        "plain": Side(WIDE, lambda: MIXED, lambda: [BlockCompile()]),
        "float8": Side(
            WIDE, lambda: MIXED, lambda: [Float8Linear(), BlockCompile()], needs="float8"
        ),
    },
    "attention": {
        "plain": Side(GPT, lambda: MIXED),
        "flash": _attending("flash", "cuda"),
        "efficient": _attending("efficient", "cuda"),
        "cudnn": _attending("cudnn", "cuda"),
        "math": _attending("math"),
    },
    "compile": {
        "plain": Side(GPT, lambda: MIXED),
        "blocks": Side(GPT, lambda: MIXED, lambda: [BlockCompile()]),
        "whole": Side(GPT, lambda: MIXED, lambda: [BlockCompile(blocks=False)]),
    },
}


def _scaled() -> Any:
    from lightning_accel import AutocastPrecision

    return AutocastPrecision("16-mixed")


def batches(side: Side, net: Benchmark, args: argparse.Namespace) -> DataLoader[Any]:
    """Return a loader of one epoch: of batches on the device, on the host or pinned, or of items to collate."""
    count = args.warm_up + args.steps
    made: list[Any] = [net.batch(index) for index in range(count if side.loads == "items" else 2)]
    if side.loads == "items":
        data = TensorDataset(*(torch.cat(parts) for parts in zip(*made, strict=True)))
        return DataLoader(data, batch_size=net.batch_size)
    if side.loads == "pinned":
        made = [tuple(part.pin_memory() for part in batch) for batch in made]
    if side.loads == "held":
        made = [tuple(part.to(args.device) for part in batch) for batch in made]
    return DataLoader((made * count)[:count], batch_size=None)


def lacks(side: Side, device: str) -> str:
    """Say why a side cannot run here, or nothing."""
    if side.needs and device != "cuda":
        return f"needs a CUDA device, this is {device}"
    if side.needs == "float8":
        if importlib.util.find_spec("torchao") is None:
            return "torchao is not installed"
        if torch.cuda.get_device_capability() < (8, 9):
            return f"{torch.cuda.get_device_name()} has no float8 units"
    return ""


def run(side: Side, args: argparse.Namespace) -> dict[str, Any]:
    """Train one side, and return its row."""
    if why := lacks(side, args.device):
        return {"skipped": why}
    torch.manual_seed(0)
    module = side.net(args.tiny)
    inner = module.inner if isinstance(module, ByHand) else module
    loader = batches(side, inner, args)
    clock = Clock(args.device, args.warm_up, args.steps)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = Trainer(
        accelerator="gpu" if args.device == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*side.callbacks(), clock],
        **side.given(),
    )
    start = time.perf_counter()
    trainer.fit(module, loader)
    peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else None
    whole = time.perf_counter() - start
    return {"step_s": clock.step_s, "loss": clock.loss, "peak_gib": peak, "fit_s": whole}


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train all sides of a part in turns, and return one row for each."""
    sides = PARTS[name]
    order = [*sides, "plain"]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    end = time.perf_counter() + args.seconds
    for turn in range(args.turns):
        for index, side in enumerate(order):
            if turn and time.perf_counter() > end:
                break
            _clear(args.device)
            try:
                row = run(sides[side], args)
            except Exception as error:  # the other sides are worth having
                row = {"failed": f"{type(error).__name__}: {error}"[:400]}
            found[side].append(row | {"again": index == len(order) - 1})
    return _rows(name, found)


def _rows(name: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    def best(rows: list[dict[str, Any]]) -> float:
        return min((row["step_s"] for row in rows if "step_s" in row), default=float("nan"))

    plain = found["plain"]
    again = best([row for row in plain if row["again"]])
    base = best([row for row in plain if not row["again"]])
    rows: list[dict[str, Any]] = [
        {"part": name, "side": "plain against plain", "ratio": base / again}
    ]
    for side, turns in found.items():
        last = turns[-1]
        said: dict[str, Any] = {key: last[key] for key in ("skipped", "failed") if key in last}
        if not said:
            said = {
                "step_ms": 1000 * best(turns),
                "ratio": min(base, again) / best(turns),
                **{key: last[key] for key in ("loss", "peak_gib")},
                "first_fit_s": turns[0]["fit_s"],
            }
        rows.append({"part": name, "side": side, **said})
    return rows


def _clear(device: str) -> None:
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> int:
    """Run one part; print its rows and append them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that mean nothing")
    parser.add_argument("--seconds", type=float, default=20.0, help="when no more turn begins")
    parser.add_argument("--output", type=Path, help="a file to append JSON lines to")
    args = parser.parse_args()
    if args.device == "cpu" and not args.tiny:
        parser.error("sizes are those of a GPU; --device cpu goes with --tiny")
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu_parts: needs a CUDA device, and PyTorch finds none here.", file=sys.stderr)
        return 2
    args.warm_up, args.steps, args.turns = (1, 2, 1) if args.tiny else (8, 24, 3)
    quiet()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    where = {"device": name, "tiny": args.tiny, "torch": about()["torch"]}
    rows = [{k: None if v != v else v for k, v in row.items()} for row in measure(args.part, args)]
    lines = [json.dumps(row | where) for row in rows]
    print("\n".join(lines))
    if args.output is not None:
        with args.output.open("a") as file:
            file.write("\n".join(lines) + "\n")
    return int(any('"failed"' in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
