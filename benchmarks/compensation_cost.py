"""What compensating a cut costs: each batch in one forward, against forwards made anew for each layer.

A GPT and a ResNet, shallow and deep, lose half of their multiply-accumulates, and the layers that read what is gone
are solved on ten batches: with all batches in step from layer to layer, as it is done, and with a forward of both
networks for each layer and batch. Both in turns, in processor time; beside it a training step, for a measure.

    python benchmarks/compensation_cost.py [--repeats 3] [--json PATH]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from models.gpt import GPT
from models.resnet import ResNet

from lightning_accel.measure import Table
from lightning_accel.pruning import Macs, lockstep, plan
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call

BATCHES = 10


def tokens() -> Tensor:
    return torch.randint(256, (16, 64))


def images() -> Tensor:
    return torch.randn(64, 1, 8, 8)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "GPT of 2 blocks": (lambda: GPT(context=64, dim=64, depth=2, num_heads=4), tokens),
    "GPT of 12 blocks": (lambda: GPT(context=64, dim=64, depth=12, num_heads=4), tokens),
    "ResNet of 4 blocks": (lambda: ResNet(widths=(32, 64), depth=2), images),
    "ResNet of 18 blocks": (lambda: ResNet(widths=(32, 64), depth=9), images),
}


@contextmanager
def anew() -> Iterator[None]:
    """Let no forward wait for another."""
    at = lockstep.Lockstep.at

    def out_of_step(*_: Any) -> Any:
        raise lockstep.OutOfStep

    lockstep.Lockstep.at = out_of_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        lockstep.Lockstep.at = at  # type: ignore[method-assign]


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def row(name: str, repeats: int) -> dict[str, Any]:
    make, data = NETS[name]
    net = make().eval()
    batches = [[Call("", (data(),), {})] for _ in range(BATCHES)]
    options: dict[str, Any] = {"calls": batches[0], "target": Macs(0.5), "batches": batches}

    def step() -> None:
        logits = trained(data())
        F.cross_entropy(
            logits.flatten(0, -2), torch.zeros(logits[..., 0].numel()).long()
        ).backward()

    trained = twin(net).train()
    found: dict[str, list[float]] = {"plain": [], "in step": [], "anew": [], "training step": []}
    for _ in range(repeats):
        found["plain"].append(seconds(lambda: plan(net, compensate=False, **options)))
        found["in step"].append(seconds(lambda: plan(net, compensate=True, **options)))
        with anew():
            found["anew"].append(seconds(lambda: plan(net, compensate=True, **options)))
        found["training step"].append(seconds(step))
    plain, ours, theirs, one = (statistics.median(values) for values in found.values())
    return {
        "network": name,
        "in step, s": ours - plain,
        "anew, s": theirs - plain,
        "ratio": (theirs - plain) / (ours - plain),
        "in training steps": (ours - plain) / one,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row(name, options.repeats) for name in NETS]
    cells = [[r["network"], *(f"{v:.2f}" for v in list(r.values())[1:])] for r in rows]
    title = f"Compensation on {BATCHES} batches, processor time beside the plan of the cut"
    print(Table(list(rows[0]), cells, title).to_markdown())
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
