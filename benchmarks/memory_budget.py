"""What a GPT keeps for backward, eager and compiled, under memory budgets and with checkpointing.

The bytes are counted (`lightning_accel.memory.saved_bytes`), so they are the same on each run; the times are
measured side by side with the compiled network without a budget. Gradients are compared with eager ones, in
fp32 and bf16.

    python benchmarks/memory_budget.py [--budget-s 5] [--json]

Exit code 1 when a budget of 0.5 keeps more than 0.55 of the bytes, or when gradients differ.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import nets
import torch
from torch import Tensor

from lightning_accel.compilation import compile_blocks
from lightning_accel.measure import Table, compare
from lightning_accel.memory import activation_budget, checkpoint_activations, saved_bytes

BUDGETS = (1.0, 0.7, 0.5, 0.3, 0.0)
GOAL = 0.55
FURTHEST = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest distance of a gradient tensor from the eager one, relative to its norm."""

Step = Callable[[], Tensor]


class Variant:
    """One way to run the same network from the same weights."""

    def __init__(self, name: str, model: nets.GPT, budget: float = 1.0, policy: str = "") -> None:
        self.name, self.budget = name, budget
        self.model = copy.deepcopy(model)
        self.batch = model.batch()
        if policy:
            checkpoint_activations(self.model, policy=policy)
        if name.startswith("compiled"):
            compile_blocks(self.model, select="net")

    def loss(self, format: str = "fp32") -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=format == "bf16"):
            return self.model.loss(self.batch)

    def step(self) -> None:
        """Run forward and backward."""
        self.loss().backward()
        self.model.zero_grad()

    def gradients(self, format: str) -> list[Tensor]:
        """Return the gradients of one step; compiles at the first call."""
        with activation_budget(self.budget):
            self.loss(format).backward()
        found = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
        self.model.zero_grad()
        return found


def variants() -> list[Variant]:
    """Make them all from one network."""
    torch.manual_seed(0)
    model = nets.GPT()
    return [
        Variant("eager", model),
        Variant("eager, full checkpointing", model, policy="full"),
        Variant("eager, selective checkpointing", model, policy="selective"),
        *(Variant(f"compiled, budget {budget}", model, budget) for budget in BUDGETS),
    ]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative distance of two gradients of one parameter."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)


def measure(budget_s: float) -> list[dict[str, Any]]:
    """Return one row per variant."""
    torch.set_num_threads(1)
    every, rows = variants(), []
    expected = {format: every[0].gradients(format) for format in FURTHEST}
    for variant in every:
        start = time.perf_counter()
        far = {f: distance(variant.gradients(f), expected[f]) for f in FURTHEST}
        seconds = time.perf_counter() - start
        kept = {f: saved_bytes(lambda v=variant, f=f: v.loss(f)) for f in FURTHEST}
        rows.append({"name": variant.name, "first_s": seconds, "bytes": kept, "distance": far})
    plain = next(v for v in every if v.name == "compiled, budget 1.0")
    base = next(row for row in rows if row["name"] == plain.name)
    for variant, row in zip(every, rows, strict=True):
        row["share"] = {f: row["bytes"][f] / base["bytes"][f] for f in FURTHEST}
        if variant is not plain:
            found = compare(plain.step, variant.step, warmup=1, budget_s=budget_s)
            row |= {"speed": found.ratio, "low": found.low, "high": found.high, "busy": found.busy}
    return rows


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """Say which deterministic goals were missed."""
    half = next(row for row in rows if row["name"].endswith("budget 0.5"))
    missed = [f"budget 0.5 keeps {s:.3f} in {f}" for f, s in half["share"].items() if s > GOAL]
    for row in rows:
        for format, far in row["distance"].items():
            if not far <= FURTHEST[format]:
                missed.append(f"{row['name']}: gradients in {format} are {far:.1e} away")
    return missed


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--budget-s", type=float, default=5.0, help="seconds for each pair of steps"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = measure(args.budget_s)
    missed = failures(rows)
    if args.json:
        print(json.dumps({"rows": rows, "missed": missed, "torch": torch.__version__}))
        return int(bool(missed))
    columns = ["", "MB kept", "share", "share bf16", "speed", "95 % interval", "gradient", "bf16"]
    lines = [
        [
            row["name"],
            round(row["bytes"]["fp32"] / 1e6, 2),
            round(row["share"]["fp32"], 3),
            round(row["share"]["bf16"], 3),
            round(row["speed"], 3) if "speed" in row else 1,
            f"{row['low']:.3f} to {row['high']:.3f}" if "speed" in row else "",
            f"{row['distance']['fp32']:.0e}",
            f"{row['distance']['bf16']:.0e}",
        ]
        for row in rows
    ]
    title = "GPT of 4 blocks of 256, 8 x 127 tokens: kept for backward, beside compiled without a budget"
    print(Table(columns, lines, title).to_text())
    print(*missed or [f"Goals met: at most {GOAL} kept by a budget of 0.5, gradients of eager."])
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
