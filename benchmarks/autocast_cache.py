"""What it costs to keep no cast of a weight: the price of `AutocastPrecision` being right.

Autocast can keep the bf16 cast of a weight until its context ends. Kept for a whole step, which is what this
package did until 2026-11-29, a weight is cast once however often it is used; but all its uses then share the
gradient of that one cast, which is summed in bf16, and a weight that changes within the step is used with its
old values. So Lightning keeps none, and neither does `AutocastPrecision`.

Each network trains forward and backward in three ways, side by side in one process: casts kept, kept again
(what difference means nothing), and not kept. `gradient` is the largest distance of a gradient from that in
fp32, relative to its norm.

    python benchmarks/autocast_cache.py [--budget-s 8] [--json]
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from typing import Any

import torch
from nets import GPT, MLP, Batch, Benchmark, ConvNet
from torch import Tensor, nn

from lightning_accel.measure import Table
from lightning_accel.measure.timing import compare
from lightning_accel.precision.autocast import autocast

USES = 64


class Recurrent(Benchmark):
    """A cell written by hand, whose weights are used once per item of the sequence."""

    def __init__(self, width: int = 256, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size, self.width = batch_size, width
        self.cell, self.head = nn.Linear(2 * width, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.width)
        for item in x.unbind(1):
            state = torch.tanh(self.cell(torch.cat([item, state], 1)))
        return self.head(state)

    def draw(self, batch_size: int, generator: torch.Generator) -> Batch:
        x = torch.randn(batch_size, USES, self.width, generator=generator)
        return x, torch.randint(10, (batch_size,), generator=generator)


CASES = {"mlp": MLP, "gpt_d256": GPT, "cnn_32px": ConvNet, f"cell used {USES} times": Recurrent}


class Way:
    """One network under one context."""

    def __init__(self, net: Benchmark, kept: bool | None) -> None:
        self.net, self.kept, self.batch = copy.deepcopy(net), kept, net.batch()

    def step(self) -> None:
        """Run forward and backward."""
        for parameter in self.net.parameters():
            parameter.grad = None
        context = (
            torch.autocast("cpu", torch.bfloat16) if self.kept else autocast("cpu", torch.bfloat16)
        )
        context = torch.autocast("cpu", enabled=False) if self.kept is None else context
        with context:
            loss = self.net.loss(self.batch)
        loss.backward()

    def gradients(self) -> list[Tensor]:
        """Return the gradients of one step."""
        self.step()
        return [p.grad.double() for p in self.net.parameters() if p.grad is not None]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest relative distance of two gradients of one parameter."""
    pairs = zip(found, expected, strict=True)
    # A bias before batch norm has no gradient but rounding.
    return max(float((a - b).norm() / b.norm()) for a, b in pairs if b.norm() > 1e-6)


def row(make: type[Benchmark], budget_s: float) -> dict[str, Any]:
    """Measure one network."""
    torch.manual_seed(0)
    net = make()
    truth = Way(net, None).gradients()
    far = [distance(Way(net, kept).gradients(), truth) for kept in (True, False)]
    again = compare(Way(net, True).step, Way(net, True).step, budget_s=budget_s / 2)
    # The time without kept casts over that with them: the price.
    price = compare(Way(net, False).step, Way(net, True).step, budget_s=budget_s)
    return {
        "price": price[2:5],
        "again": again[2:5],
        "kept": far[0],
        "not_kept": far[1],
        "busy": price.busy,
    }


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--budget-s", type=float, default=8.0, help="seconds for each network")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = {name: row(make, args.budget_s) for name, make in CASES.items()}
    if args.json:
        print(json.dumps({"rows": rows, "torch": torch.__version__}))
        return 0
    columns = ["", "times as long", "95 % interval", "kept again", "gradient, kept", "not kept"]
    lines = [
        [
            name,
            round(found["price"][0], 3),
            "{1:.3f} to {2:.3f}".format(*found["price"]),
            "{1:.3f} to {2:.3f}".format(*found["again"]),
            f"{found['kept']:.1e}",
            f"{found['not_kept']:.1e}",
        ]
        for name, found in rows.items()
    ]
    print(
        Table(columns, lines, "Forward and backward without kept casts, over with them").to_text()
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
